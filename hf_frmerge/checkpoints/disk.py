"""Changes to files and folders: each succeeds completely or raises `MergeError`, and none writes through a link."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_frmerge.errors import MergeError

__all__ = [
    "FULL_DISK",
    "copy_folder",
    "create_file",
    "disk_error",
    "disk_errors",
    "make_folder",
    "remove_file",
    "remove_folder",
    "rename",
    "sync_directory",
    "write_all",
    "write_file",
]

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


@contextmanager
def disk_errors(path: Path, done: str) -> Iterator[None]:
    """
    Raise any `OSError` of the block as a `MergeError` with a readable message.

    Args:
        path: File or folder the message names.
        done: Participle that completes "could not be ...", such as `"written"`.

    Raises:
        MergeError: With the file, the failed action, the reason and the remedy.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, done) from error


def disk_error(error: OSError, path: Path, done: str) -> MergeError:
    """Return an error of the system as a `MergeError`; see `disk_errors`."""
    if error.errno in FULL_DISK:
        remedy = "Make room on the disk"
    elif error.errno in _FORBIDDEN:
        remedy = f"See to the permissions of {path.parent}"
    elif error.errno in _TOO_MANY:
        remedy = "Allow more open files (`ulimit -n 4096`)"
    else:
        remedy = "Check the disk"
    return MergeError(
        f"{path} could not be {done}: {error.strerror or error}. {remedy}, then run the command again; an interrupted "
        "merge goes on with --resume (resume_from_checkpoint=True)."
    )


def create_file(path: Path) -> int:
    """
    Create a new file and open it for reading and writing; a file that had the name is unlinked first.

    An existing file is never opened for writing, because its name may be a hard link to an input.

    Returns:
        `int`: File descriptor.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def write_all(fd: int, data: bytes | memoryview, start: int) -> None:
    """
    Write all bytes at `start`, in several calls if need be: `pwrite` may write fewer bytes than it is given.

    Raises:
        OSError: If a byte cannot be written.
    """
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, start)
        if count == 0:
            raise OSError(errno.EIO, "the system takes no more bytes")
        start += count
        view = view[count:]


def write_file(path: Path, content: bytes | str | Iterable[bytes | memoryview]) -> None:
    """
    Write a file atomically: to a temporary name, synced to disk, then renamed.

    What does not fit into memory is passed in parts.

    Raises:
        MergeError: If it cannot be written; an older file of that name is then still there.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path, "written"):
        try:
            fd = create_file(temporary)
            try:
                start = 0
                for part in _parts(content):
                    write_all(fd, part, start)
                    start += len(part)
                os.fsync(fd)  # before the rename: after a power cut the name must not stand for an empty file
            finally:
                os.close(fd)
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
    sync_directory(path.parent)


def _parts(content: bytes | str | Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    if isinstance(content, str):
        return [content.encode()]
    return [content] if isinstance(content, bytes) else content


def copy_folder(folder: Path, target: Path) -> None:
    """Copy all files of a folder into another; what had the name of a copy loses it, and is not written to."""

    def copy(source: str, path: str) -> None:
        Path(path).unlink(missing_ok=True)  # it may be another name of an input
        shutil.copy2(source, path)

    shutil.copytree(folder, target, copy_function=copy, dirs_exist_ok=True)


def rename(path: Path, target: Path) -> None:
    """Rename a file over `target`. If `target` is a link, the link is replaced and the file it points to untouched."""
    with disk_errors(target, "put in place"):
        path.replace(target)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, unless it exists."""
    with disk_errors(path, "created"):
        path.mkdir(parents=True, exist_ok=True)


def remove_file(path: Path) -> None:
    """Remove a file or link, if it exists."""
    with disk_errors(path, "removed"):
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder with its contents, if it exists; if it is a link, only the link is removed."""
    with disk_errors(path, "removed"):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def sync_directory(folder: Path) -> None:
    """Sync a folder to disk, so that the renames in it survive a power cut."""
    with disk_errors(folder, "forced to disk"):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
