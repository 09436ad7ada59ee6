"""Checkpoint folder behind an fsspec URL, read by byte ranges."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.errors import CheckpointError


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
        """List the files directly in the folder or a subfolder, sorted; plain web servers may not be able to."""
        return self._entries_of("file", self._join(subfolder) if subfolder else self._root)

    def subfolders(self) -> list[str]:
        """List the folders directly in the folder, sorted; plain web servers may not be able to."""
        return self._entries_of("directory", self._root)

    def exists(self, name: str) -> bool:
        """Whether `name` is a file."""
        try:
            return bool(self._info(name)["type"] == "file")
        except FileNotFoundError as error:
            # fsspec's HTTP file system raises FileNotFoundError for every failure and keeps the real one as the cause.
            # Object stores answer 403 for a missing file if the user may not list the bucket.
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
        """Return a mark that changes when the file is rewritten: its size, and a tag or time from the store."""
        self._fs.invalidate_cache(self._join(name))  # otherwise fsspec answers from a cached listing
        info = self._info(name)
        tags = (info.get(key) for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"))
        return f"{info['size']}-{next((tag for tag in tags if tag), '')}"

    def known_sha256(self, name: str) -> str | None:
        """Return None: stores do not give the SHA-256 of a file."""
        return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes `[start, stop)` of `name`."""
        if stop is None:
            return bytes(self._ask("cat_file", self._join(name)))
        data = bytes(self._ask("cat_file", self._join(name), start=start, end=stop))
        if len(data) > stop - start:
            raise OSError(errno.EOPNOTSUPP, "the server ignores byte ranges and sends the whole file")
        return data

    def view(self, name: str, size: int, start: int, stop: int) -> NDArray[np.uint8]:
        """Fetch bytes `[start, stop)` of `name` by one ranged request; read-only uint8, 1-D."""
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
            # Each store raises the errors of its own client library. They all mean that the store did not answer.
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
