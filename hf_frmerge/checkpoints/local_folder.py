"""Checkpoint folder on a local disk, read by byte ranges."""

from __future__ import annotations

import errno
import re
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.page_cache import MappedRange, Mapping, release

# Each mapping holds a file descriptor. 1024 descriptors is a common limit, and a large model has 200 shards.
_OPEN_MAPPINGS = 32


class LocalFolder:
    """Checkpoint folder on a local (or mounted) disk. All methods may be called from several threads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._root = Path(path)
        self._mappings: OrderedDict[str, Mapping] = OrderedDict()
        self._lock = Lock()

    def names(self, subfolder: str = "") -> list[str]:
        """List the files directly in the folder or in a subfolder of it, sorted; empty if there is no such folder."""
        folder = self._root / subfolder
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []

    def subfolders(self) -> list[str]:
        """List the folders directly in the folder, sorted."""
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir()) if self._root.is_dir() else []

    def exists(self, name: str) -> bool:
        """Whether `name` is a file; False for a dangling link."""
        return (self._root / name).is_file()

    def size(self, name: str) -> int:
        """Size of `name` in bytes."""
        return (self._root / name).stat().st_size

    def identity(self, name: str) -> str:
        """
        Return a cheap mark that changes when the file is rewritten, truncated or replaced: size, mtime and inode.

        The ctime is left out: it also changes with links and permissions, which do not touch the contents.
        """
        status = (self._root / name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"

    def is_broken(self, name: str) -> bool:
        """Whether a page of `name` was read that could not be loaded from the file; see `Mapping`."""
        with self._lock:
            mapping = self._mappings.get(name)
        return mapping is not None and mapping.is_broken

    def known_sha256(self, name: str) -> str | None:
        """Return the SHA-256 of `name` if it is known without reading: the Hub's cache names large files by it."""
        path = self._root / name
        blob = path.readlink() if path.is_symlink() else Path()
        is_blob = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
        return blob.name if is_blob else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes `[start, stop)` of `name`; fewer if the file ends before `stop`."""
        with (self._root / name).open("rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)

    def view(self, name: str, size: int, start: int, stop: int) -> NDArray[np.uint8]:
        """
        Return bytes `[start, stop)` of `name`, without a copy if the system allows it.

        The pages are faulted in by this call and not while the caller computes, so that a disk error or a truncated
        file is an `OSError` and not a SIGBUS.

        Args:
            name (`str`):
                File name inside the folder.
            size (`int`):
                Size the file had when its header was checked, in bytes.
            start, stop (`int`):
                Range in bytes from the start of the file.

        Returns:
            `numpy.ndarray`: Read-only uint8, 1-D, `stop - start` long. It keeps its mapping alive.

        Raises:
            OSError: If the file is gone, shorter than `size`, or cannot be read.
        """
        view = self.mapping(name, size).view(start, stop)
        return self._read_copy(name, start, stop) if view is None else view

    def release(self, name: str, start: int, stop: int) -> None:
        """Unmap the pages that lie wholly inside `[start, stop)`; the system's page cache keeps their contents."""
        with self._lock:
            mapping = self._mappings.get(name)
        if mapping is not None:
            release([MappedRange(mapping, start, stop)])

    def close(self) -> None:
        """Drop all mappings; views that were handed out keep theirs alive."""
        with self._lock:
            self._mappings.clear()

    def mapping(self, name: str, size: int) -> Mapping:
        """Return the mapping of `name`, mapping the whole file if need be; see `Mapping` for what it raises."""
        with self._lock:
            mapping = self._mappings.get(name)
            if mapping is None:
                mapping = self._mappings[name] = Mapping(str(self._root / name), size)
                # A view of a mapping evicted here keeps it alive; the next read of that file maps it again.
                if len(self._mappings) > _OPEN_MAPPINGS:
                    self._mappings.popitem(last=False)
            else:
                self._mappings.move_to_end(name)
            return mapping

    def _read_copy(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Read a range into memory: without the native extension, or if faulting in failed, to raise the reason."""
        out = np.empty(stop - start, np.uint8)
        with (self._root / name).open("rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < out.size:
                count = file.readinto(out[done:].data)
                if not count:
                    raise OSError(errno.EIO, f"the file ends at byte {start + done}, {stop} expected")
                done += count
        out.flags.writeable = False
        return out
