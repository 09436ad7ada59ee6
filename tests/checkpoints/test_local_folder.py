"""Whatever lies where a file is expected ends in a sentence, and nothing waits for a pipe."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.errors import CheckpointError


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        there = Path.cwd()
        os.chdir(path.parent)  # the name of a socket may have a hundred bytes only
        bound.bind(path.name)
        os.chdir(there)


SPECIAL = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_named_and_not_read(tmp_path, kind):
    SPECIAL[kind](tmp_path / "config.json")
    folder = LocalFolder(str(tmp_path))
    with pytest.raises(CheckpointError, match=rf"config.json is {kind}, expected a file"):
        folder.exists("config.json")
    with pytest.raises(OSError, match=rf"it is {kind}|No such device"):
        folder.read("config.json")


def test_links(tmp_path):
    folder = LocalFolder(str(tmp_path))
    (tmp_path / "there").write_text("x")
    (tmp_path / "good").symlink_to("there")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    assert folder.exists("good")
    assert folder.read("good") == b"x"
    with pytest.raises(CheckpointError, match="dangling is a link to nowhere, which is not there"):
        folder.exists("dangling")
    with pytest.raises(CheckpointError, match="circle could not be opened"):
        folder.exists("circle")
    # A file that nobody asked for by name is still listed: whoever takes it finds out.
    assert folder.names() == ["circle", "dangling", "good", "there"]
    (tmp_path / "dangling").unlink()
    assert not folder.exists("dangling")


@pytest.mark.parametrize("name", ["missing", "there/below", "a\0b", "\ud800"])
def test_names_that_no_file_has(tmp_path, name):
    (tmp_path / "there").write_text("x")
    assert not LocalFolder(str(tmp_path)).exists(name)
