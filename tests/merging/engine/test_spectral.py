"""Spectral methods through the engine: matrices as a whole, everything else averaged, and what the record says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import SHAPES, random_model, write_family, write_model
from safetensors.torch import load_file, save_file

from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.methods.spectral.decision import RULES, memory_bytes
from hf_frmerge.methods.spectral.inputs import Experts, SpectralOptions
from hf_frmerge.methods.table import METHODS
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

WEIGHTS = [0.5, 0.3, 0.2]
SPECTRAL = [m.name for m in METHODS.values() if m.kind == "spectral" and m.n_experts is None and not m.needs_factors]
MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 300)


def merge(
    experts: Sequence[str], base: str, out: Path, method: str, observer: StepObserver | None = None, **options: Any
) -> Path:
    args = MergingArguments(output_dir=str(out), method=method, **options)
    run_merge(build_plan(experts, args, WEIGHTS, base), observer or StepObserver(), Processes())
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", SPECTRAL)
def test_matrices_of_layers_are_merged_and_the_rest_is_averaged(
    tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    base, experts = write_family(tmp_path, dtype=dtype)
    out = merge(experts, base, tmp_path / "out", method, scale=0.7)
    origin, *models = (load_file(Path(folder) / "model.safetensors") for folder in [base, *experts])
    merged = load_file(out / "model.safetensors")
    rounding = 2.0**-23 if dtype == torch.float32 else 2.0**-8
    for name, shape in SHAPES.items():
        start = origin[name].double().numpy()
        deltas = np.stack([model[name].double().numpy() for model in models]) - start
        if "layers" in name and len(shape) == 2:
            options = SpectralOptions(METHODS[method].density or 1.0)
            given = Experts(deltas.astype(np.float32), start.astype(np.float32))
            expected = start + 0.7 * RULES[method](given, np.array(WEIGHTS), options)
        else:
            expected = start + np.tensordot(np.array(WEIGHTS), deltas, axes=1)
        actual = merged[name].double().numpy()
        assert np.linalg.norm(actual - expected) <= (rounding + 1e-5) * np.linalg.norm(expected), name


@pytest.mark.parametrize("method", SPECTRAL)
def test_the_record_is_verified_and_the_merge_made_again(tmp_path: Path, method: str) -> None:
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    out = merge(experts, base, tmp_path / "out", method)
    decision = json.loads((out / "merge_manifest.json").read_text())["tensors"][MATRIX]["decision"]
    assert (decision["kind"], decision["rule"], decision["weights"]) == ("spectral", method, WEIGHTS)
    report = verify(str(out))
    assert report.problems == [] and report.checked_tensors == len(SHAPES)
    assert reproduce(str(out)).identical


@pytest.mark.parametrize(
    ("method", "kept", "refused", "told"), [("tsv_m", 1.0005, 1.002, "0.001"), ("knots", 1.02, 1.05, "0.03")]
)
def test_what_differs_is_found_by_verify(tmp_path: Path, method: str, kept: float, refused: float, told: str) -> None:
    base, experts = write_family(tmp_path)
    out = merge(experts, base, tmp_path / "out", method)
    path = out / "merge_manifest.json"
    text = path.read_text()
    manifest = json.loads(text)
    manifest["tensors"][MATRIX]["decision"]["scale"] = kept
    path.write_text(json.dumps(manifest))
    assert verify(str(out)).problems == []
    manifest["tensors"][MATRIX]["decision"]["scale"] = refused
    path.write_text(json.dumps(manifest))
    (problem,) = verify(str(out)).problems
    assert problem == f"Tensor {MATRIX!r} is farther than {told} of its delta from what its experts and decision give."
    path.write_text(text)
    tensors = load_file(out / "model.safetensors")
    tensors[MATRIX][0, 0] += 1e-6
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert f"Tensor {MATRIX!r} was changed after the merge." in verify(str(out)).problems


class Stop(StepObserver):
    def __init__(self, after: int) -> None:
        self._left = after

    def end(self, outcome: StepOutcome) -> bool:
        self._left -= 1
        return self._left > 0


def test_the_bits_do_not_depend_on_threads_or_a_resume(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    expected = (merge(experts, base, tmp_path / "one", "tsv_m", num_workers=1) / "model.safetensors").read_bytes()
    other = merge(experts, base, tmp_path / "three", "tsv_m", num_workers=3)
    assert (other / "model.safetensors").read_bytes() == expected
    for after in (1, 4):
        out = tmp_path / f"stopped{after}"
        merge(experts, base, out, "tsv_m", Stop(after))
        merge(experts, base, out, "tsv_m", resume_from_checkpoint=True)
        assert (out / "model.safetensors").read_bytes() == expected


def test_a_matrix_beyond_the_budget_is_refused_by_name_and_the_advice_works(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    needed = memory_bytes("iso_c", 40, 24, 3)
    args = MergingArguments(method="iso_c", memory_budget=str(needed - 1))
    sentence = rf"merges '{MATRIX}', \[40, 24\], as one matrix, which takes 1MiB for 3 experts.*memory_budget=1MiB"
    with pytest.raises(ArgumentError, match=sentence):
        build_plan(experts, args, WEIGHTS, base)
    plan = build_plan(experts, MergingArguments(method="iso_c", memory_budget="1MiB"), WEIGHTS, base)
    assert plan.describe()["memory_estimate"] >= needed


def test_the_declared_memory_is_enough(tmp_path: Path) -> None:
    # In a process of its own, whose peak is that of one matrix: numpy and LAPACK's workspace included.
    code = """
import resource, sys
import numpy as np
from hf_frmerge.methods.spectral.decision import RULES, memory_bytes
from hf_frmerge.methods.spectral.inputs import Experts, SpectralOptions
name, rows, cols = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
def merge(rows, cols):
    base, *deltas = rng.standard_normal((4, rows, cols), np.float32)
    deltas = np.stack([deltas[0], deltas[1], 1e-3 * deltas[2]])
    RULES[name](Experts(deltas, base), np.full(3, 1 / 3), SpectralOptions(0.8))
merge(20, 30)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(rows, cols)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / memory_bytes(name, rows, cols, 3))
"""
    for method in SPECTRAL:
        for shape in (("700", "900"), ("300", "1200"), ("1500", "300")):
            command = [sys.executable, "-c", code, method, *shape]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            assert float(done.stdout) <= 1.0, (method, shape, done.stdout)


def test_the_memory_declared_for_cores_is_enough_and_less() -> None:
    code = """
import resource, sys
import numpy as np
from hf_frmerge.geometry.lowrank import Factors
from hf_frmerge.methods.spectral.decision import Spectral, memory_bytes
from hf_frmerge.methods.spectral.inputs import SpectralOptions
name, rows, cols, rank = sys.argv[1], 1500, 1800, 40
decision = Spectral(name, (1 / 3,) * 3, 1.0, SpectralOptions(0.8))
rng = np.random.default_rng(0)
def merge(rows, cols, rank):
    shapes = (rows, rank), (rank, cols)
    decision.merge_factors([Factors(*(rng.standard_normal(shape, np.float32) for shape in shapes)) for _ in range(3)])
merge(20, 30, 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(rows, cols, rank)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
print(memory_bytes(name, rows, cols, 3, 3 * rank), memory_bytes(name, rows, cols, 3))
"""
    for method in [name for name in SPECTRAL if METHODS[name].cores]:
        done = subprocess.run([sys.executable, "-c", code, method], capture_output=True, text=True, check=True)
        taken, declared, as_matrices = map(int, done.stdout.split())
        assert taken <= declared < as_matrices / 3, (method, done.stdout)


def test_the_policy_for_other_tensors_is_told(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    plan = build_plan(experts, MergingArguments(method="swudi"), WEIGHTS, base)
    [note] = [note for note in plan.notes if "averaged" in note]
    assert note.startswith("method='swudi' merges 4 matrices of layers. The experts' deltas of the other 4 tensors (")


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    with pytest.raises(ArgumentError, match=r"`method='tsv_m'` takes block=tensor, but got 'row'"):
        MergingArguments(method="tsv_m", block="row")
    with pytest.raises(ArgumentError, match=r'tsv_m is made of deltas: it needs space="deltas" and a base_model'):
        merge(experts, base, tmp_path / "out", "tsv_m", space="weights")
    bad = random_model(5)
    bad[MATRIX][0, 0] = float("inf")
    spoilt = write_model(tmp_path / "bad", bad)
    with pytest.raises(NonFiniteError, match=rf"'{MATRIX}' of expert '.*bad'"):
        merge([experts[0], spoilt, experts[1]], base, tmp_path / "out", "res_merge")
