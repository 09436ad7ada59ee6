"""Memory-mapped local files, whose pages are faulted in before they are used."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    from hf_frmerge.kernels._native import fault_in, give_back, guard, is_broken, unguard
except ImportError:  # not built: files are read, not mapped

    def fault_in(ranges: tuple[NDArray[np.uint8], ...], /) -> bool:
        """Report that nothing was faulted in."""
        return False

    def give_back(ranges: tuple[NDArray[np.uint8], ...], /) -> None:
        """Do nothing."""

    def guard(buffer: NDArray[np.uint8], /) -> int:
        """Do nothing."""
        return 0

    def unguard(number: int, /) -> None:
        """Do nothing."""

    def is_broken(number: int, /) -> bool:
        """Report that no page failed: without the extension files are not mapped."""
        return False


class Mapping:
    """
    Read-only mapping of one whole file.

    If a page cannot be read any more (the file was truncated, the disk fails), it reads as zeros, and the mapping
    `is_broken` from then on.

    Args:
        path: The file.
        size: Size in bytes when its header was checked.

    Raises:
        OSError: If the file is gone or has another size now.
    """

    def __init__(self, path: str, size: int) -> None:
        with Path(path).open("rb") as file:
            current = os.fstat(file.fileno()).st_size
            if current != size:
                raise _changed(size, current)
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        self._size = size
        self._array = np.frombuffer(self._map, np.uint8)
        self._guard = guard(self._array)
        # Every view keeps this array alive, and the array keeps the pages. So the guard is removed when no view is
        # left that could touch a page, and before the pages are unmapped.
        weakref.finalize(self._array, unguard, self._guard).atexit = False
        # Ranges that are faulted in and not yet released. The combine pass reads what the Gram pass has just read;
        # faulting those pages in again would cost up to a fifth of all reading.
        self._held: set[tuple[int, int]] = set()

    @property
    def is_broken(self) -> bool:
        """Whether a page was read that could not be loaded from the file."""
        return is_broken(self._guard)

    def held(self, start: int, stop: int) -> NDArray[np.uint8] | None:
        """Return bytes `[start, stop)` if they are faulted in, else `None`."""
        return self._array[start:stop] if (start, stop) in self._held else None

    def view(self, start: int, stop: int) -> NDArray[np.uint8] | None:
        """
        Fault in bytes `[start, stop)` and return them; `None` if that fails, and a plain read will tell why.

        Raises:
            OSError: If the file has another size now: a page past its end cannot be touched safely.
        """
        current = self._map.size()
        if current != self._size:
            raise _changed(self._size, current)
        prefetch([MappedRange(self, start, stop)])
        return self.held(start, stop)


class MappedRange(NamedTuple):
    """Bytes `[start, stop)` of a mapped file."""

    mapping: Mapping
    start: int
    stop: int


def prefetch(ranges: Sequence[MappedRange]) -> None:
    """Fault in several ranges with one call. If that fails, none of them is `held`, and `Mapping.view` raises."""
    missing = [part for part in ranges if part[1:] not in part.mapping._held]
    if missing and fault_in(tuple(mapping._array[start:stop] for mapping, start, stop in missing)):
        for mapping, start, stop in missing:
            mapping._held.add((start, stop))


def release(ranges: Sequence[MappedRange]) -> None:
    """Unmap the pages that lie wholly inside the ranges; the system's page cache keeps their contents."""
    for mapping, start, stop in ranges:
        inside = [held for held in tuple(mapping._held) if start <= held[0] and held[1] <= stop]
        mapping._held.difference_update(inside)
    give_back(tuple(mapping._array[start:stop] for mapping, start, stop in ranges))


def _changed(expected: int, current: int) -> OSError:
    return OSError(errno.EIO, f"the file changed while it was in use: it had {expected} bytes and now has {current}")
