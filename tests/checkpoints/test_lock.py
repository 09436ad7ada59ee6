"""One writer in a folder, whatever process or thread it is in, and none left when it is dead."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_frmerge.checkpoints import lock as lock_module
from hf_frmerge.checkpoints.lock import LOCK_FILE, refuse_while_merging, sole_writer
from hf_frmerge.errors import MergeError

TAKEN = r"Another merge or push is at work in '.*out'\. Wait until it has ended, or stop it, or choose another folder"

HOLD = """
import sys
from hf_frmerge.checkpoints.lock import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Hold the lock in another process, until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = hold(out)
    with pytest.raises(MergeError, match=TAKEN), sole_writer(out):
        pass
    with pytest.raises(MergeError, match=TAKEN):
        refuse_while_merging(out)
    first.communicate("", timeout=60)
    refuse_while_merging(out)
    with sole_writer(out):
        pass
    assert not out.exists()


def test_the_lock_of_a_killed_process_is_gone(tmp_path: Path) -> None:
    first = hold(tmp_path / "out")
    first.kill()
    first.communicate(timeout=60)
    assert (tmp_path / "out" / LOCK_FILE).exists()  # which nobody holds
    refuse_while_merging(tmp_path / "out")
    with sole_writer(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_two_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "out"):
        with pytest.raises(MergeError, match=TAKEN), sole_writer(tmp_path / "out"):
            pass
        with sole_writer(tmp_path / "other"):
            pass
        with pytest.raises(MergeError, match=TAKEN):  # the refused one has not taken the lock away
            refuse_while_merging(tmp_path / "out")


def test_a_lock_file_removed_before_it_is_locked_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ends between open and flock of the second; a third has made a file of its own by then, or not yet."""
    out, tries, flock = tmp_path / "out", [], fcntl.flock

    def removed_at_first(fd: int, operation: int) -> None:
        flock(fd, operation)
        tries.append(fd)
        if len(tries) == 1:
            (out / LOCK_FILE).unlink()

    monkeypatch.setattr(lock_module.fcntl, "flock", removed_at_first)
    with sole_writer(out) as lock:
        assert len(tries) == 2
        assert os.path.samestat(os.stat(out / LOCK_FILE), os.fstat(lock.fd))


def test_a_folder_made_anew_is_not_the_one_that_was_locked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with sole_writer(out) as first:
        first.check()
        shutil.rmtree(out)
        with pytest.raises(MergeError, match="out was removed or replaced while this merge was writing to it"):
            first.check()
        with sole_writer(out):
            with pytest.raises(MergeError, match="removed or replaced"):
                first.check()
            first_ends = sole_writer(out)
            with pytest.raises(MergeError, match=TAKEN):
                first_ends.__enter__()


def test_the_first_does_not_remove_the_lock_of_the_second(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = sole_writer(out), sole_writer(out)
    first.__enter__()
    shutil.rmtree(out)
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(MergeError, match=TAKEN):
        refuse_while_merging(out)
    second.__exit__(None, None, None)
    assert not out.exists()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_here(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock_module.fcntl, "flock", none_here)
    with sole_writer(tmp_path / "out"):
        assert [record.message for record in caplog.records] == [
            f"The file system of {tmp_path / 'out'} has no locks: see that no other merge writes there."
        ]
        refuse_while_merging(tmp_path / "out")


def test_looking_creates_nothing(tmp_path: Path) -> None:
    refuse_while_merging(tmp_path)
    refuse_while_merging(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
