"""Lock of an output folder: one writer at a time, released by the system when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hf_frmerge.checkpoints.disk import disk_errors, make_folder
from hf_frmerge.errors import MergeError

logger = logging.getLogger(__name__)

LOCK_FILE = ".frmerge.lock"
"""Lies outside the staging folder, which is created and removed during a merge. A push leaves it out."""

# What flock says on file systems that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class FolderLock:
    """Held lock of an output folder."""

    folder: Path
    fd: int

    @property
    def is_in_place(self) -> bool:
        """Whether the locked file is still the one in the folder; if it was removed, another may have its name."""
        try:
            current = os.lstat(self.folder / LOCK_FILE)
        except FileNotFoundError:
            return False
        return os.path.samestat(current, os.fstat(self.fd))

    def check(self) -> None:
        """
        Check that the folder was not removed in the meantime: another merge may have created it again.

        Raises:
            MergeError: If the folder was removed or replaced.
        """
        if not self.is_in_place:
            raise MergeError(
                f"{self.folder} was removed or replaced while this merge was writing to it. See that nothing else "
                "writes there, and start the merge again."
            )


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[FolderLock]:
    """
    Hold the lock of an output folder, which is created if it does not exist.

    flock belongs to the open file, so it excludes other processes as well as other threads and merges of this process.
    It also excludes other machines if the file system forwards locks, as NFS does. If the file system has no locks, a
    warning is logged.

    Raises:
        MergeError: If another merge holds the lock.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    make_folder(folder)
    lock = _acquire(folder)
    try:
        yield lock
    finally:
        # Remove the file before unlocking it: a process that has already opened it and gets the lock next then sees
        # that its file is not in place any more, and tries again.
        with suppress(OSError):
            if lock.is_in_place:
                (folder / LOCK_FILE).unlink()
        os.close(lock.fd)
        if is_new:
            with suppress(OSError):  # usually it is not empty any more
                folder.rmdir()


def refuse_while_merging(folder: str | Path) -> None:
    """
    Raise if a merge is writing to a folder. Creates nothing.

    Raises:
        MergeError: If another merge holds the lock of the folder.
    """
    try:
        fd = os.open(Path(folder) / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # there is no lock file, or it cannot be read
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _is_taken(folder) from None
    except OSError:
        return  # a file system without locks: the merge that writes there has logged a warning
    finally:
        os.close(fd)


def _acquire(folder: Path) -> FolderLock:
    path = folder / LOCK_FILE
    while True:
        # O_NOFOLLOW: a link of this name must not make us create or lock a file elsewhere.
        with disk_errors(path, "opened"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise _is_taken(folder) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                raise MergeError(
                    f"{path} could not be locked: {error.strerror}. Choose another output_dir."
                ) from error
            logger.warning("The file system of %s has no locks: see that no other merge writes there.", folder)
        lock = FolderLock(folder, fd)
        if lock.is_in_place:
            return lock
        os.close(fd)  # the last holder removed the file after we had opened it: try again


def _is_taken(folder: str | Path) -> MergeError:
    return MergeError(
        f"Another merge or push is at work in {str(folder)!r}. Wait until it has ended, or stop it, or choose another "
        "folder."
    )
