"""Write the shards of a layout piece by piece, from any thread, under temporary names until all are complete."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.disk import (
    FULL_DISK,
    create_file,
    disk_errors,
    make_folder,
    remove_file,
    remove_folder,
    rename,
    sync_directory,
    write_all,
    write_file,
)
from hf_frmerge.checkpoints.tensors.layout import ShardLayout
from hf_frmerge.checkpoints.tensors.shard_index import INDEX_FILE
from hf_frmerge.errors import MergeError

__all__ = ["STAGING", "CheckpointWriter", "ShardLayout", "check_free_space", "remove_staging", "remove_weights"]

logger = logging.getLogger(__name__)

STAGING = ".frmerge"

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# Writeback is started whenever this many bytes are dirty, so that the final fsync finds little left to do. Writing and
# syncing 1 GB took 40 % less time than leaving everything to fsync.
_WRITEBACK_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2  # <fcntl.h>: start writing dirty pages, do not wait

# Shards whose files stay open. A process may have 1024 files open, and 1000 shards are not unheard of.
_KEPT_OPEN = 64

# Errors of posix_fallocate if the file system cannot reserve blocks and the C library does not emulate it.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL)


class CheckpointWriter:
    """
    Writer of the shards of a layout, under temporary names that become the real ones at the end.

    Call `create` (or `reopen`), then `write` and `read_back` from any thread, then `finish`. In a job of several
    processes, each process passes its own `shards`, all call `sync`, and after a barrier one of them calls `publish`.

    Args:
        layout (`ShardLayout`):
            The plan.
        output_dir (`str` or `Path`):
            Folder of the finished checkpoint.
        staging (`str` or `Path`, *optional*):
            Folder of the unfinished files, on the same file system; by default `.frmerge` inside `output_dir`.
        shards (`Iterable[int]`, *optional*):
            Shards this process writes; by default all.
    """

    def __init__(
        self,
        layout: ShardLayout,
        output_dir: str | Path,
        staging: str | Path | None = None,
        shards: Iterable[int] | None = None,
    ) -> None:
        self.layout = layout
        self.output_dir = Path(output_dir)
        self.staging = Path(staging) if staging is not None else self.output_dir / STAGING
        self.shards = tuple(range(len(layout.shards))) if shards is None else tuple(shards)
        self._fds: dict[int, int] = {}
        self._inodes: dict[int, tuple[int, int]] = {}
        self._dirty: dict[int, int] = {}

    def create(self) -> None:
        """Create this process's files at full size, with their headers, replacing staged files of an earlier run."""
        make_folder(self.staging)
        missing = sum(self.layout.shards[index].size for index in self.shards)
        for index in self.shards:
            self._allocate(index, missing)
            missing -= self.layout.shards[index].size

    def reopen(self) -> list[int]:
        """
        Open the files of an earlier run whose size and header fit, and create the others.

        A symbolic link, or a file with more than one hard link, is created anew: it may be an input under another
        name.

        Returns:
            `list[int]`: Shards that were created and hold no data of the earlier run.
        """
        make_folder(self.staging)
        created = [index for index in self.shards if not self._adopt(index)]
        missing = sum(self.layout.shards[index].size for index in created)
        for index in created:
            self._allocate(index, missing)
            missing -= self.layout.shards[index].size
        return created

    def write(self, name: str, offset: int, data: NDArray[np.uint8] | bytes) -> None:
        """
        Write bytes of a tensor at `offset` from its start. Thread-safe.

        Raises:
            MergeError: If the disk is full or fails; the staged files stay for a resume.
        """
        shard, start = self._locate(name, offset, offset + len(data))
        self._write(shard, start, data)

    def write_next(self, names: Sequence[str], data: NDArray[np.uint8]) -> None:
        """Write whole tensors that lie side by side in one file with one call; otherwise as `write`."""
        shard, start = self.layout.places[names[0]]
        end = start
        for name in names:
            if self.layout.places[name] != (shard, end):
                raise ValueError(f"{name!r} does not lie beside the tensors before it.")
            end += self.layout.nbytes[name]
        if end - start != len(data):
            raise ValueError(f"Expected {end - start} bytes of {len(names)} tensors, got {len(data)}.")
        self._write(shard, start, data)

    def _write(self, shard: int, start: int, data: NDArray[np.uint8] | bytes) -> None:
        view = memoryview(np.frombuffer(data, np.uint8).data if len(data) else b"")
        try:
            with self._opened(shard) as fd:
                write_all(fd, view, start)
                self._start_writeback(shard, fd, len(view))
        except OSError as error:
            raise self._failure(error, shard, len(view)) from error

    def read_back(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Read bytes `[start, stop)` of a tensor from the unfinished file; a copy, 1-D. Thread-safe."""
        shard, position = self._locate(name, start, stop)
        out = np.empty(stop - start, np.uint8)
        view = out.data
        with disk_errors(self._staged(shard), "read back"), self._opened(shard) as fd:
            while view:
                count = os.preadv(fd, [view], position)
                if count == 0:
                    raise MergeError(
                        f"{self._staged(shard)} was cut short by another program. Start the merge afresh."
                    )
                position += count
                view = view[count:]
        return out

    def finish(self) -> None:
        """Sync the files to disk and rename them into place; for a job of one process."""
        self.sync()
        self.publish()

    def sync(self) -> None:
        """Force this process's shards to disk and close them."""
        try:
            for index in list(self._inodes):
                try:
                    with self._opened(index) as fd:
                        os.fsync(fd)
                    if index in self._fds:
                        os.close(self._fds.pop(index))
                except OSError as error:
                    raise self._failure(error, index, 0) from error
        finally:
            self.close()

    def publish(self) -> None:
        """
        Rename all shards of the layout into place, write the index, and remove weight files of an earlier merge.

        Call it once, after every process has called `sync`.
        """
        staged = {self._staged(index): self.output_dir / shard.file for index, shard in enumerate(self.layout.shards)}
        # Check all files before renaming any, so that an error leaves the staged files as they are.
        for path in staged:
            if not path.is_file():
                raise MergeError(f"{path} is missing: another program removed it. Start the merge afresh.")
        for path, final in staged.items():
            rename(path, final)
        text = self.layout.index_json()  # written after the shards that it names
        if text is not None:
            write_file(self.output_dir / INDEX_FILE, text)
        keep = {shard.file for shard in self.layout.shards} | ({INDEX_FILE} if text is not None else set())
        remove_weights(self.output_dir, keep=keep)
        sync_directory(self.output_dir)

    def close(self) -> None:
        """Close the files without finishing them; they stay for a resume, which checks their contents by digest."""
        self._inodes.clear()
        while self._fds:
            with suppress(OSError):
                os.close(self._fds.popitem()[1])

    def _staged(self, index: int) -> Path:
        # The suffix is not ".safetensors", so that no loader takes an unfinished file for a checkpoint.
        return self.staging / f"{self.layout.shards[index].file}.partial"

    def _locate(self, name: str, start: int, stop: int) -> tuple[int, int]:
        if not 0 <= start <= stop <= self.layout.nbytes[name]:
            raise ValueError(f"Bytes {start} to {stop} are outside {name!r} of {self.layout.nbytes[name]} bytes.")
        shard, offset = self.layout.places[name]
        return shard, offset + start

    def _allocate(self, index: int, missing: int) -> None:
        shard, path = self.layout.shards[index], self._staged(index)
        fd = None
        try:
            fd = create_file(path)
            _reserve(fd, shard.size)
            write_all(fd, shard.header, 0)
        except OSError as error:
            if fd is not None:
                os.close(fd)
            free = shutil.disk_usage(self.staging).free
            with suppress(OSError):
                path.unlink()
            if error.errno in FULL_DISK:
                raise _no_space(self.output_dir, missing, free) from error
            raise MergeError(f"{path} could not be created: {error.strerror}.") from error
        self._keep(index, fd)

    def _keep(self, index: int, fd: int) -> None:
        """Take over the descriptor of a shard: kept open for the first shards, closed for the others."""
        status = os.fstat(fd)
        self._inodes[index] = status.st_dev, status.st_ino
        if len(self._fds) < _KEPT_OPEN:
            self._fds[index] = fd
        else:
            os.close(fd)

    @contextmanager
    def _opened(self, index: int) -> Iterator[int]:
        """Yield a descriptor of a shard, opened for this use if it is not kept."""
        if index in self._fds:
            yield self._fds[index]
            return
        fd = os.open(self._staged(index), os.O_RDWR | os.O_NOFOLLOW)
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) != self._inodes[index]:
                raise OSError(errno.ESTALE, "another program replaced it")
            yield fd
        finally:
            os.close(fd)

    def _start_writeback(self, index: int, fd: int, written: int) -> None:
        # Not locked: threads may overwrite each other's counts, which only shifts the start of the writeback.
        self._dirty[index] = self._dirty.get(index, 0) + written
        if self._dirty[index] >= _WRITEBACK_BYTES:
            self._dirty[index] = 0
            start_writeback(fd)

    def _adopt(self, index: int) -> bool:
        """Open a shard that an earlier run left, if it can be continued; return whether it was."""
        staged, final = self._staged(index), self.output_dir / self.layout.shards[index].file
        fd = self._open_earlier(staged, index)
        if fd is None and not os.path.lexists(staged):
            fd = self._open_earlier(final, index)
            if fd is not None:
                # The earlier run was killed while it renamed its shards. Take the final name away again, so that the
                # folder does not look finished.
                rename(final, staged)
        if fd is not None:
            self._keep(index, fd)
        return fd is not None

    def _open_earlier(self, path: Path, index: int) -> int | None:
        """Open a file of an earlier run; None if it is missing, a link, has other hard links, or is another shard."""
        shard = self.layout.shards[index]
        with disk_errors(path, "opened"):
            try:
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                return None  # a link
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size == shard.size:
            with disk_errors(path, "read"):
                if os.pread(fd, len(shard.header), 0) == shard.header:
                    return fd
        os.close(fd)
        return None

    def _failure(self, error: OSError, index: int, unwritten: int) -> MergeError:
        if error.errno in FULL_DISK:
            return _no_space(self.output_dir, unwritten, shutil.disk_usage(self.staging).free)
        return MergeError(
            f"{self._staged(index)} could not be written: {error.strerror}. What was written so far is kept; see to "
            "the disk and resume."
        )


def check_free_space(output_dir: str | Path, needed: int) -> None:
    """
    Check that the output fits on its disk.

    Args:
        output_dir (`str` or `Path`):
            Output folder; need not exist yet.
        needed (`int`):
            Bytes that will be written.

    Raises:
        MergeError: If fewer than `needed` bytes are free.
    """
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _no_space(Path(output_dir), needed, free)


def remove_weights(output_dir: str | Path, keep: Iterable[str] = ()) -> None:
    """Remove `model*.safetensors` files and their index from a folder: a loader might take stale ones for the new."""
    kept = set(keep)
    with suppress(FileNotFoundError):
        for path in Path(output_dir).iterdir():
            if _WEIGHT_FILE.fullmatch(path.name) and path.name not in kept:
                remove_file(path)


def remove_staging(staging: Path) -> None:
    """Remove the staging folder after a complete merge; if that fails, only warn, as the model itself is complete."""
    try:
        remove_folder(staging)
    except MergeError as error:
        logger.warning("Nothing is missing in %s, but the folder %s stays: %s", staging.parent, staging.name, error)


def start_writeback(fd: int) -> None:
    """Start writing a file's dirty pages to disk (Linux only); errors are left to the fsync at the end."""
    if sys.platform == "linux":
        _libc().sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return libc


def _reserve(fd: int, size: int) -> None:
    """Set the size of a new file and reserve its blocks: a full disk shows now, and later writes are 4x faster."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
        else:
            return
    os.ftruncate(fd, size)


def _no_space(output_dir: Path, needed: int, free: int) -> MergeError:
    return MergeError(
        f"Not enough space in {output_dir}: {needed / 1e9:.2f} GB ({needed} bytes) are still needed, "
        f"{free / 1e9:.2f} GB ({free} bytes) are free. Make room or choose another `output_dir`; what was written so "
        "far is kept for a resume."
    )
