"""Checkpoint folder on a local disk, read by byte ranges."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import OrderedDict
from io import BufferedReader
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.page_cache import MappedRange, Mapping, release
from hf_frmerge.errors import CheckpointError

# Each mapping holds a file descriptor. 1024 descriptors is a common limit, a large model has 200 shards, and there may
# be 30 models.
_OPEN_MAPPINGS = 16


class LocalFolder:
    """Checkpoint folder on a local (or mounted) disk. All methods may be called from several threads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._root = Path(path)
        self._mappings: OrderedDict[str, Mapping] = OrderedDict()
        self._lock = Lock()

    def names(self, subfolder: str = "") -> list[str]:
        """
        List the files directly in the folder or in a subfolder of it, sorted; empty if there is no such folder.

        What is neither a file nor a folder, such as a dangling link, is listed too: `read` says what is wrong with it.
        """
        folder = self._root / subfolder
        return sorted(entry.name for entry in folder.iterdir() if not entry.is_dir()) if folder.is_dir() else []

    def subfolders(self) -> list[str]:
        """List the folders directly in the folder, sorted."""
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir()) if self._root.is_dir() else []

    def exists(self, name: str) -> bool:
        """
        Whether there is a file `name`.

        Raises:
            CheckpointError: If there is something else of that name: a dangling link, a folder, a pipe, a device.
        """
        path = self._root / name
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file can have such a name
            if not path.is_symlink():
                return False
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which is not there. Bring that file back, or remove the "
                "link; if this is the Hub's cache, remove the link and download the model again."
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path} could not be opened: {error.strerror}.") from error
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is {_kind(mode)}, expected a file. Remove it, or put the file there.")
        return True

    def is_file(self, name: str) -> bool:
        """Whether `name` is a file, if it is not known whether there should be one; False for a dangling link."""
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
        with self._open(name) as file:
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
        with self._open(name) as file:
            file.seek(start)
            done = 0
            while done < out.size:
                count = file.readinto(out[done:].data)
                if not count:
                    raise OSError(errno.EIO, f"the file ends at byte {start + done}, {stop} expected")
                done += count
        out.flags.writeable = False
        return out

    def _open(self, name: str) -> BufferedReader:
        """Open a file for reading. A pipe or device would never end, or take what it gives from another reader."""
        fd = os.open(self._root / name, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK a pipe waits for a writer
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(fd)
            raise OSError(errno.EINVAL, f"it is {_kind(mode)}, expected a file")
        return os.fdopen(fd, "rb")


def _kind(mode: int) -> str:
    """Name what is not a regular file."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
