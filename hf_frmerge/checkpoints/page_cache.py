"""Local files mapped into memory, their pages faulted in before they are touched."""

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
        """Say that nothing was faulted in."""
        return False

    def give_back(ranges: tuple[NDArray[np.uint8], ...], /) -> None:
        """Do nothing."""

    def guard(buffer: NDArray[np.uint8], /) -> int:
        """Do nothing."""
        return 0

    def unguard(number: int, /) -> None:
        """Do nothing."""

    def is_broken(number: int, /) -> bool:
        """Say that all pages could be read, for none was."""
        return False


class Mapping:
    """
    Read-only mapping of one whole file.

    Where a page cannot be read any more (the file was cut short, the disk fails), whoever touches it reads zeros, and
    the mapping `is_broken` from then on.

    Args:
        path: The file.
        size: Bytes it had when its header was checked.

    Raises:
        OSError: If the file is gone or has another size by now.
    """

    def __init__(self, path: str, size: int) -> None:
        with Path(path).open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise _changed(size, found)
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        self._size = size
        self._array = np.frombuffer(self._map, np.uint8)
        self._guard = guard(self._array)
        # All views keep this array, and it keeps the pages: the guard goes when nobody can touch them, before they do.
        weakref.finalize(self._array, unguard, self._guard).atexit = False
        # Ranges faulted in and not given back. The combine pass reads what the Gram pass read a moment ago; walking
        # those pages again would cost as much as a fifth of all reading.
        self._held: set[tuple[int, int]] = set()

    @property
    def is_broken(self) -> bool:
        """Whether something that was read of it was not in the file."""
        return is_broken(self._guard)

    def held(self, start: int, stop: int) -> NDArray[np.uint8] | None:
        """Return bytes `[start, stop)` if they were faulted in, else `None`."""
        return self._array[start:stop] if (start, stop) in self._held else None

    def view(self, start: int, stop: int) -> NDArray[np.uint8] | None:
        """
        Return bytes `[start, stop)`, faulted in; `None` if they cannot be, for reasons that a plain read will meet.

        Raises:
            OSError: If the file has another size by now: a page past its end cannot be touched safely.
        """
        found = self._map.size()
        if found != self._size:
            raise _changed(self._size, found)
        prefetch([MappedRange(self, start, stop)])
        return self.held(start, stop)


class MappedRange(NamedTuple):
    """Bytes `[start, stop)` of a mapped file."""

    mapping: Mapping
    start: int
    stop: int


def prefetch(ranges: Sequence[MappedRange]) -> None:
    """Fault in several ranges with one call. If that fails, none of them is `held`; `Mapping.view` will say why."""
    missing = [part for part in ranges if part[1:] not in part.mapping._held]
    if missing and fault_in(tuple(mapping._array[start:stop] for mapping, start, stop in missing)):
        for mapping, start, stop in missing:
            mapping._held.add((start, stop))


def release(ranges: Sequence[MappedRange]) -> None:
    """Give back the pages that lie wholly inside the ranges; the page cache keeps their contents."""
    for mapping, start, stop in ranges:
        inside = [held for held in tuple(mapping._held) if start <= held[0] and held[1] <= stop]
        mapping._held.difference_update(inside)
    give_back(tuple(mapping._array[start:stop] for mapping, start, stop in ranges))


def _changed(expected: int, found: int) -> OSError:
    return OSError(errno.EIO, f"the file changed while it was in use: it had {expected} bytes and now has {found}")
