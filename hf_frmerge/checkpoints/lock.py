"""One writer in an output folder at a time: a lock that ends with its process, however that ends."""

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
"""Beside the staging folder, which comes and goes, and under a name that no push takes along."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class FolderLock:
    """The lock of an output folder, held."""

    folder: Path
    fd: int

    @property
    def is_in_place(self) -> bool:
        """Whether the locked file is still the one in the folder: another may lie there once this was removed."""
        try:
            there = os.lstat(self.folder / LOCK_FILE)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self.fd))

    def check(self) -> None:
        """
        Refuse to go on in a folder that was removed meanwhile: another merge may have made it anew.

        Raises:
            MergeError: If it was.
        """
        if not self.is_in_place:
            raise MergeError(
                f"{self.folder} was removed or replaced while this merge was writing to it. See that nothing else "
                "writes there, and start the merge again."
            )


@contextmanager
def sole_writer(folder: str | Path) -> Iterator[FolderLock]:
    """
    Hold the lock of an output folder, which is made if it is not there.

    The lock is on an open file: it excludes other processes, other threads and other merges of this process alike, and
    those of other machines where the file system passes locks on, as NFS does. Where it has none, a warning is logged.

    Raises:
        MergeError: If another merge holds it.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    make_folder(folder)
    lock = _acquire(folder)
    try:
        yield lock
    finally:
        # Removed while it is locked: whoever has opened it already will find that it is not in place.
        with suppress(OSError):
            if lock.is_in_place:
                (folder / LOCK_FILE).unlink()
        os.close(lock.fd)
        if is_new:
            with suppress(OSError):  # there is something in it, as a rule
                folder.rmdir()


def refuse_while_merging(folder: str | Path) -> None:
    """
    Refuse a folder that a merge is writing to. Creates nothing.

    Raises:
        MergeError: If one is.
    """
    try:
        fd = os.open(Path(folder) / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # no lock, or one that only those can see who may write there
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _is_taken(folder) from None
    except OSError:
        return  # a file system without locks: whoever merges there was warned
    finally:
        os.close(fd)


def _acquire(folder: Path) -> FolderLock:
    path = folder / LOCK_FILE
    while True:
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
        os.close(fd)  # its last holder removed it after we had opened it


def _is_taken(folder: str | Path) -> MergeError:
    return MergeError(
        f"Another merge is writing to {str(folder)!r}. Wait until it has ended, or stop it, or choose another folder."
    )
