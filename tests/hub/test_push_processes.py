"""Pushes of real processes: of two only one talks, and one that is killed leaves nothing half visible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub_server import ALICE_TOKEN, HubServer
from merge_reference import write_family

from hf_frmerge import FisherRaoMerger, MergingArguments

SCRIPT = Path(__file__).with_name("push_from_process.py")
REPO = ("models", "alice/from-processes")


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start(root: Path, *launcher: str, experts: list[str] | None = None) -> subprocess.Popen[str]:
    _, local = write_family(root, n=2)
    command = [sys.executable, *launcher, str(SCRIPT), str(root), ALICE_TOKEN, *(experts or local)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(SCRIPT.parents[2])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_only_the_main_process_talks(hub: HubServer, tmp_path: Path) -> None:
    process = start(tmp_path, *TWO)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-3000:]
    main, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert main == {"n_processes": 2, "commit": hub.repos[REPO].branches["main"]}
    assert other == {"n_processes": 2, "commit": None}
    assert len(hub.repos[REPO].commits) == 2
    to_hub = [request for request in hub.requests if "lfs-storage" not in request.path]
    assert {request.headers["user-agent"].rpartition("origin/")[2] for request in to_hub} == {"rank0"}


@pytest.mark.slow
def test_a_branch_that_moves_between_two_processes_is_not_merged_from_two_commits(
    hub: HubServer, tmp_path: Path
) -> None:
    _, experts = write_family(tmp_path, n=2)
    for index, folder in enumerate(experts):
        hub.add_repo(f"lab/e{index}", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    (tmp_path / "wait").touch()
    process = start(tmp_path, *TWO, experts=["lab/e0", "lab/e1"])
    deadline = time.monotonic() + 200
    while not hub.sent("GET", "/lfs-storage/") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    repo = hub.repos["models", "lab/e0"]  # the main process has looked it up; the other has not
    moved = repo.add_commit(repo.commit_of("main"), "Move", dict(repo.commit_of("main").files))
    repo.branches["main"] = moved.oid
    (tmp_path / "go").touch()
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-3000:]
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert "lab/e0 was changed on the Hub while the processes" in seen["error"]
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_killed_push_leaves_nothing_visible_and_its_uploads_are_not_sent_again(
    hub: HubServer, tmp_path: Path
) -> None:
    release = threading.Event()
    hub.fail("POST", "/commit/", hold=release)  # the commit never arrives: the process is killed on the way to it
    process = start(tmp_path)
    try:
        deadline = time.monotonic() + 120
        while hub.faults[0].times and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert hub.faults[0].times == 0, process.communicate()[1][-3000:]
    finally:
        process.kill()
        process.wait()
        release.set()
    uploads = len(hub.sent("PUT", "/lfs-storage/"))
    assert uploads == 2  # weights and coefficients
    assert [commit.title for commit in hub.repos[REPO].commits.values()] == ["initial commit"]

    args = MergingArguments(output_dir=str(tmp_path / "out"), disable_tqdm=True, overwrite=True, hub_token=ALICE_TOKEN)
    merger = FisherRaoMerger([str(tmp_path / "e0"), str(tmp_path / "e1")], args).merge()
    first = merger.push_to_hub("alice/from-processes")
    assert len(hub.sent("PUT", "/lfs-storage/")) == uploads
    assert first is not None and first.oid == hub.repos[REPO].branches["main"]
    assert set(hub.repos[REPO].commit_of("main").files) >= {"README.md", "config.json", "model.safetensors"}

    again = merger.push_to_hub("alice/from-processes")  # writes the card again, which comes out the same
    assert again is not None and again.oid == first.oid
    assert len(hub.repos[REPO].commits) == 2
