"""Files of a checkpoint folder, on local disk or behind an fsspec URL, read by byte ranges."""

from __future__ import annotations

import errno
import re
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.page_cache import MappedRange, Mapping, release
from hf_frmerge.errors import CheckpointError

# One mapping holds one file descriptor; 1024 descriptors is a common limit and a large model has 200 shards.
_OPEN_MAPPINGS = 32


def open_folder(path: str) -> LocalFolder | RemoteFolder:
    """Open a checkpoint folder given as a local path or as an fsspec URL."""
    if path.startswith("hub://"):
        from hf_frmerge.checkpoints.hub.folder import found_folder

        return found_folder(path)
    return RemoteFolder(path) if "://" in path else LocalFolder(path)


class LocalFolder:
    """Checkpoint folder on a local (or mounted) disk. All methods may be called from several threads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._root = Path(path)
        self._mappings: OrderedDict[str, Mapping] = OrderedDict()
        self._lock = Lock()

    def names(self, subfolder: str = "") -> list[str]:
        """Names of the files directly in the folder or in a subfolder of it, sorted; none if it does not exist."""
        folder = self._root / subfolder
        return sorted(entry.name for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []

    def subfolders(self) -> list[str]:
        """Names of the folders directly in the folder, sorted."""
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir()) if self._root.is_dir() else []

    def exists(self, name: str) -> bool:
        """Whether `name` is a file; a dangling link is none."""
        return (self._root / name).is_file()

    def size(self, name: str) -> int:
        """Size of `name` in bytes."""
        return (self._root / name).stat().st_size

    def identity(self, name: str) -> str:
        """
        Cheap mark that changes when the file is rewritten, cut short or replaced: size, time of modification, inode.

        The time of the last change of status is left out: another name or other permissions change no contents.
        """
        found = (self._root / name).stat()
        return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"

    def is_broken(self, name: str) -> bool:
        """Whether something that was read of `name` through its mapping was not in the file; see `Mapping`."""
        with self._lock:
            mapping = self._mappings.get(name)
        return mapping is not None and mapping.is_broken

    def known_sha256(self, name: str) -> str | None:
        """SHA-256 of `name` where it is known without reading: the Hub's cache names large files by it."""
        path = self._root / name
        blob = path.readlink() if path.is_symlink() else Path()
        is_blob = blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
        return blob.name if is_blob else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `[start, stop)` of `name`; fewer if the file ends before."""
        with (self._root / name).open("rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)

    def view(self, name: str, size: int, start: int, stop: int) -> NDArray[np.uint8]:
        """
        Bytes `[start, stop)` of `name` without a copy where the system allows it.

        The pages are faulted in here and not while the caller computes: a disk error or a file cut short then
        arrives as an `OSError`, where touching the mapping would kill the process with SIGBUS.

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
        """Give back the pages that lie wholly inside `[start, stop)`; the page cache keeps their contents."""
        with self._lock:
            mapping = self._mappings.get(name)
        if mapping is not None:
            release([MappedRange(mapping, start, stop)])

    def close(self) -> None:
        """Forget all mappings; views handed out stay valid until they are dropped themselves."""
        with self._lock:
            self._mappings.clear()

    def mapping(self, name: str, size: int) -> Mapping:
        """Map the whole of `name`, or return its mapping; see `Mapping` for what it raises."""
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


class RemoteFolder:
    """Checkpoint folder behind an fsspec URL (`s3://`, `gs://`, `hf://`, `https://`, `memory://`, ...)."""

    def __init__(self, path: str) -> None:
        import fsspec

        self.path = path.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.path)
        except (ImportError, ValueError) as error:
            # ValueError: no such protocol. ImportError: its package is not installed; fsspec names the package.
            raise CheckpointError(f"Cannot open {path!r}: {error}") from error

    def names(self, subfolder: str = "") -> list[str]:
        """Names of the files directly in the folder or a subfolder, sorted; plain web servers may not tell."""
        return self._entries_of("file", self._join(subfolder) if subfolder else self._root)

    def subfolders(self) -> list[str]:
        """Names of the folders directly in the folder, sorted; plain web servers may not tell."""
        return self._entries_of("directory", self._root)

    def exists(self, name: str) -> bool:
        """Whether `name` is a file."""
        try:
            return bool(self._info(name)["type"] == "file")
        except FileNotFoundError as error:
            # fsspec's HTTP file system says so of every failure and keeps the real one as the cause. Object stores
            # answer 403 for a missing file to those who may not list the bucket.
            cause = error.__cause__
            if cause is None or getattr(cause, "status", None) in (403, 404, 410):
                return False
            raise OSError(errno.EIO, f"{type(cause).__name__}: {cause}") from error

    def size(self, name: str) -> int:
        """Size of `name` in bytes."""
        size = self._info(name)["size"]
        if size is None:
            raise OSError(errno.EOPNOTSUPP, "the server does not tell the size of the file")
        return int(size)

    def identity(self, name: str) -> str:
        """Mark that changes when the file is rewritten: its size, and what else the store keeps for it."""
        self._fs.invalidate_cache(self._join(name))  # or a listing kept from before would answer
        info = self._info(name)
        known = (info.get(key) for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"))
        return f"{info['size']}-{next((value for value in known if value), '')}"

    def known_sha256(self, name: str) -> str | None:
        """SHA-256 of `name` where it is known without reading: stores do not tell."""
        return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `[start, stop)` of `name`."""
        if stop is None:
            return bytes(self._ask("cat_file", self._join(name)))
        data = bytes(self._ask("cat_file", self._join(name), start=start, end=stop))
        if len(data) > stop - start:
            raise OSError(errno.EOPNOTSUPP, "the server ignores byte ranges and sends the whole file")
        return data

    def view(self, name: str, size: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes `[start, stop)` of `name`, fetched by one ranged request; read-only uint8, 1-D."""
        data = self.read(name, start, stop) if stop > start else b""
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"asked for {stop - start} bytes from byte {start}, got {len(data)}")
        return np.frombuffer(data, np.uint8)

    def release(self, name: str, start: int, stop: int) -> None:
        """Do nothing: ranges are not kept."""

    def close(self) -> None:
        """Do nothing: connections belong to fsspec."""

    def _entries_of(self, kind: str, path: str) -> list[str]:
        try:
            entries = self._ask("ls", path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == kind)

    def _join(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _info(self, name: str) -> dict[str, Any]:
        return dict(self._ask("info", self._join(name)))

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        try:
            return getattr(self._fs, method)(*args, **options)
        except (OSError, NotImplementedError):
            raise
        except Exception as error:
            # Each store raises the errors of its own client library; to us they all mean that it did not answer.
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
