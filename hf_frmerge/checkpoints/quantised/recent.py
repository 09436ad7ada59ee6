"""The tensors that were computed last, for those who read them in pieces."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LIMIT = 256 << 20


@dataclass
class _Entry:
    lock: threading.Lock = field(default_factory=threading.Lock)
    values: NDArray[np.uint8] | None = None


class Recent:
    """Keep computed tensors up to some bytes, but always the last; threads that want the same one wait for it."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}  # the one that was used last comes last

    def get(self, name: str, compute: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Return a tensor, computing it if it is not kept."""
        with self._lock:
            entry = self._entries.pop(name, None) or _Entry()
            self._entries[name] = entry
        with entry.lock:
            if entry.values is None:
                entry.values = compute()
            values = entry.values
        with self._lock:
            self._forget()
        return values

    def _forget(self) -> None:
        known = {name: entry.values.nbytes for name, entry in self._entries.items() if entry.values is not None}
        total = sum(known.values())
        for name in list(known)[:-1]:
            if total <= self._limit:
                return
            total -= known[name]
            del self._entries[name]
