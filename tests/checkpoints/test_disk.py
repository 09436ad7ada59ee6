"""Small files: whole or as they were, and never written through a link."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hf_frmerge.checkpoints.disk import disk_errors, remove_folder, write_file
from hf_frmerge.errors import MergeError


def test_files_are_whole_and_replace_old_ones(tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", "{}\n")
    write_file(tmp_path / "a.json", b"\xff" * 100_000)
    assert (tmp_path / "a.json").read_bytes() == b"\xff" * 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["config.json", ".config.json.partial"])
def test_a_link_loses_its_name_and_nothing_else(tmp_path: Path, link: object, name: str) -> None:
    other = tmp_path / "other"
    other.write_text("theirs")
    (tmp_path / "out").mkdir()
    link(other, tmp_path / "out" / name)  # type: ignore[operator]
    write_file(tmp_path / "out" / "config.json", "ours")
    assert other.read_text() == "theirs"
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"config.json": "ours"}
    assert not (tmp_path / "out" / "config.json").is_symlink()


@pytest.mark.parametrize("call", ["pwrite", "fsync", "close"])
def test_what_was_there_stays_when_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write_file(tmp_path / "a.json", "old")
    real = getattr(os, call)

    def fails(fd: int, *args: object) -> None:
        if call == "close":
            real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(MergeError, match=r"a\.json could not be written: Input/output error\. Check the disk"):
        write_file(tmp_path / "a.json", "new")
    monkeypatch.undo()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Make room"), (errno.EACCES, "See to the permissions of /a"), (errno.EIO, "Check the disk")],
)
def test_errors_say_what_to_do(number: int, remedy: str) -> None:
    with (
        pytest.raises(MergeError, match=rf"^/a/b could not be renamed: {os.strerror(number)}\. {remedy}.*--resume"),
        disk_errors(Path("/a/b"), "renamed"),
    ):
        raise OSError(number, os.strerror(number))


def test_of_a_link_to_a_folder_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    remove_folder(tmp_path / "link")
    remove_folder(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert (tmp_path / "theirs" / "file").exists()
