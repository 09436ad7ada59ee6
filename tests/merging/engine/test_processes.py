"""Two real processes, started by torchrun and by accelerate, write what one process writes."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from merge_reference import SHAPES, random_model, write_model
from process_scenarios import BLOCKS, SKIPPED, merge, merge_all, merge_and_listen

from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.merging.engine.engine import StepObserver, StepOutcome
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE

SCRIPT = Path(__file__).parents[2] / "process_scenarios.py"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip


class Killed(Exception):
    pass


class StopAfter(StepObserver):
    def __init__(self, tensors: int) -> None:
        self.left = tensors

    def end(self, outcome: StepOutcome) -> bool:
        self.left -= 1
        if not self.left:
            raise Killed
        return True


def write_experts(folder: Path, hub: HubServer) -> None:
    """Experts with a tensor that needs double precision, and two families with NaN at either end."""
    base = random_model(0)
    for i in range(3):
        tensors = random_model(i + 1, torch.bfloat16, base=base)
        tensors["model.layers.1.norm.weight"] *= 1e-16
        write_model(folder / f"e{i}", tensors)
        names = [*tensors][:: len(tensors) - 1]
        for models, name in zip(("first", "last"), names):
            broken = {**tensors, name: tensors[name] * (math.nan if i == 1 else 1)}
            write_model(folder / f"{models}{i}", broken)
        hub.add_repo(f"lab/e{i}", {path.name: path.read_bytes() for path in (folder / f"e{i}").iterdir()})


def launch(launcher: list[str], root: Path, block: str) -> subprocess.CompletedProcess[str]:
    here = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1])])  # this checkout, whatever is installed
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": here}
    if launcher is ACCELERATE:  # torchrun finds a free port by itself; older versions of accelerate do not
        launcher = [*launcher, "--main_process_port", str(free_port())]
    command = [sys.executable, "-m", *launcher, str(SCRIPT), str(root), block]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def contents(folder: Path) -> dict[str, bytes]:
    """All files that must not depend on how the merge was run."""
    names = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".json")]
    return {name: (folder / name).read_bytes() for name in sorted(names) if not name.startswith((".", "merge_mani"))}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_write_what_one_writes(tmp_path: Path, hub: HubServer, launcher: list[str]) -> None:
    write_experts(tmp_path, hub)
    merge_all(tmp_path, tmp_path / "one")
    for block in BLOCKS:
        with pytest.raises(Killed):
            merge(tmp_path, tmp_path / "resumed" / block, StopAfter(3), block=block)
    alone = merge_and_listen(tmp_path / "one" / "hub")
    killed = "tensor" if launcher is TORCHRUN else "layer"

    run = launch(launcher, tmp_path, killed)

    ranks = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in ranks), run.stderr[-3000:]
    main, other = (json.loads(path.read_text()) for path in ranks)

    folders = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(folders) == 3 * len(BLOCKS) + 3
    for name in folders:
        actual = contents(tmp_path / "two" / name)
        assert actual == contents(tmp_path / "one" / name), name
        assert len([file for file in actual if file.startswith("model-")]) > 3 or "shards" not in name
        manifests = [json.loads((tmp_path / n / name / "merge_manifest.json").read_text()) for n in ("one", "two")]
        assert [manifest["n_processes"] for manifest in manifests] == [1, 2]
        assert manifests[0]["tensors"] == manifests[1]["tensors"]
        if name.endswith("skip"):
            actions = {tensor: entry["action"] for tensor, entry in manifests[1]["tensors"].items()}
            assert actions == dict.fromkeys(SHAPES, "merge") | {SKIPPED: "skip"}
    for block in BLOCKS:
        assert contents(tmp_path / "resumed" / block) == contents(tmp_path / "one" / block)

    # Callbacks hear everything on the main process, nothing elsewhere.
    assert main["begun"] == alone.begun
    assert sorted(main["ended"]) == sorted(alone.ended) == sorted(SHAPES)
    assert other["begun"] == other["ended"] == []
    assert (tmp_path / "two" / "hub" / "README.md").exists()

    # The others open what is there, and create nothing but their journal (they ask for the folder, which exists).
    created = {Path(path).name for path in other["written"] if not path.endswith(".safetensors.partial")}
    assert created == {"journal-1.jsonl.partial", ".frmerge"}  # the journal gets its name when its first line is in it

    # An error of either process is everybody's.
    for models, name, errors in zip(
        ("first", "last"), [*SHAPES][:: len(SHAPES) - 1], zip(*[main["errors"], other["errors"]])
    ):
        assert all(f"NaN or infinite values in tensor {name!r}" in error for error in errors)
        assert sum(error.startswith("Process ") for error in errors) == 1
        assert not list((tmp_path / models).glob("*.safetensors")) and not (tmp_path / models / "config.json").exists()

    assert all("Process 1 does not see the files that the main process made" in e["errors"][2] for e in (main, other))

    # The job fails when a process vanishes, and one process alone goes on with what two have left.
    out = tmp_path / "killed" / killed
    assert run.returncode != 0
    assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()
    merge(tmp_path, out, block=killed, resume_from_checkpoint=True)
    assert contents(out) == contents(tmp_path / "one" / killed)
    with pytest.raises(ResumeError, match="is complete"):
        merge(tmp_path, out, block=killed, resume_from_checkpoint=True)
    assert COEFFICIENTS_FILE in contents(out)


@pytest.mark.parametrize("size", ["2", "x", ""])
def test_a_world_size_that_no_launcher_set_is_refused(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ArgumentError, match=f"WORLD_SIZE='{size}' is set"):
        Processes()
    monkeypatch.delenv("WORLD_SIZE")  # the advice
    assert Processes().size == 1
