"""Changes to files that happen wholly or raise a sentence, and never reach a file through a link."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hf_frmerge.errors import MergeError

__all__ = [
    "FULL_DISK",
    "copy_folder",
    "create_file",
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


@contextmanager
def disk_errors(path: Path, done: str) -> Iterator[None]:
    """
    Turn an `OSError` into a sentence.

    Args:
        path: File or folder it is about.
        done: What could not be done to it, as a participle: `"written"`.

    Raises:
        MergeError: With the file, what could not be done, why, and what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            remedy = "Make room on the disk"
        elif error.errno in _FORBIDDEN:
            remedy = f"See to the permissions of {path.parent}"
        else:
            remedy = "Check the disk"
        raise MergeError(
            f"{path} could not be {done}: {error.strerror or error}. {remedy}, then run the command again; an "
            "interrupted merge goes on with --resume (resume_from_checkpoint=True)."
        ) from error


def create_file(path: Path) -> int:
    """
    Create a file that was not there and open it for reading and writing; what had its name before loses it.

    A file is never opened for writing by a name that it has already: it may be another name of an input.

    Returns:
        `int`: File descriptor.
    """
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def write_all(fd: int, data: bytes | memoryview, start: int) -> None:
    """
    Write bytes at `start` to the last one: the system may take fewer than it is given.

    Raises:
        OSError: If it takes no more.
    """
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, start)
        if count == 0:
            raise OSError(errno.EIO, "the system takes no more bytes")
        start += count
        view = view[count:]


def write_file(path: Path, content: bytes | str) -> None:
    """
    Write a file so that it is either whole, on disk and in place, or not there at all.

    Raises:
        MergeError: If it cannot be written; what was there before is then left as it is.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with disk_errors(path, "written"):
        try:
            fd = create_file(temporary)
            try:
                write_all(fd, content.encode() if isinstance(content, str) else content, 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
    sync_directory(path.parent)


def copy_folder(folder: Path, target: Path) -> None:
    """Copy all files of a folder into another; what had the name of a copy loses it, and is not written to."""

    def copy(source: str, path: str) -> None:
        Path(path).unlink(missing_ok=True)  # it may be another name of an input
        shutil.copy2(source, path)

    shutil.copytree(folder, target, copy_function=copy, dirs_exist_ok=True)


def rename(path: Path, target: Path) -> None:
    """Give a file its name; a file or link that had it loses it, and stays what it is under its other names."""
    with disk_errors(target, "put in place"):
        path.replace(target)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there."""
    with disk_errors(path, "created"):
        path.mkdir(parents=True, exist_ok=True)


def remove_file(path: Path) -> None:
    """Remove a file or link, if it is there."""
    with disk_errors(path, "removed"):
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it, if it is there; of a link, the link."""
    with disk_errors(path, "removed"):
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def sync_directory(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    with disk_errors(folder, "forced to disk"):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
