"""Names of weights on tiny models, from the command line to the record, against float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from click_runner import click_runner
from merge_reference import random_model, write_model
from safetensors.numpy import load_file, save_file

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.merging.arguments.expert_arguments import ExpertArguments
from hf_frmerge.merging.callbacks.callback import MergeCallback
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify
from hf_frmerge.weighting.norm_aware import norm_aware_weights

Frmerge = Callable[..., Result]


@pytest.fixture
def frmerge() -> Frmerge:
    return lambda *arguments: click_runner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def tensors(folder: str | Path) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / "model.safetensors")


def write_run(folder: Path, steps: tuple[int, ...] = (1000, 200, 600)) -> list[str]:
    """Checkpoints of a run, in the order of their names."""
    base = random_model(0)
    for seed, step in enumerate(steps):
        checkpoint = folder / f"checkpoint-{step}"
        write_model(checkpoint, random_model(seed + 1, base=base, spread=0.1))
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return sorted(str(path) for path in folder.glob("checkpoint-*"))


def test_a_soup_from_the_command_line(frmerge: Frmerge, tmp_path: Path) -> None:
    checkpoints = write_run(tmp_path / "run")  # 1000, 200, 600: as a shell lists them
    out = tmp_path / "out"
    options = ("--method", "linear", "--weights", "ema:0.5", "--output-dir", out)
    plan = frmerge("plan", *checkpoints, *options)
    assert plan.exit_code == 0, plan.stderr
    result = frmerge("merge", *checkpoints, *options)
    assert result.exit_code == 0, result.stderr
    assert "Weights by 'ema:0.5'" in result.stderr
    manifest = read_manifest(out)
    assert manifest.weights == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    inputs = [tensors(checkpoint) for checkpoint in checkpoints]
    for name, merged in tensors(out).items():
        expected = sum(w * x[name].astype(np.float64) for w, x in zip((4 / 7, 1 / 7, 2 / 7), inputs))
        np.testing.assert_allclose(merged, expected, rtol=2e-7, atol=1e-9)
    assert verify(str(out)).ok
    assert reproduce(str(out)).identical


def test_a_configuration_file_takes_a_name(frmerge: Frmerge, tmp_path: Path) -> None:
    checkpoints = write_run(tmp_path / "run")
    config = {"experts": checkpoints, "weights": "1-sqrt", "output_dir": str(tmp_path / "out")}
    (tmp_path / "merge.json").write_text(json.dumps(config))
    assert frmerge("merge", tmp_path / "merge.json").exit_code == 0
    third = 3**-0.5
    expected = [1 - (2 / 3) ** 0.5, third, (2 / 3) ** 0.5 - third]
    assert read_manifest(tmp_path / "out").weights == pytest.approx(expected)


def test_an_interrupted_soup_is_resumed(tmp_path: Path) -> None:
    class Stop(MergeCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_merge_stop = state.global_step >= 2
            return control

    checkpoints = write_run(tmp_path / "run")
    whole = FisherRaoMerger(checkpoints, MergingArguments(output_dir=str(tmp_path / "a")), weights="1-sqrt").merge()
    args = MergingArguments(output_dir=str(tmp_path / "b"))
    with pytest.raises(MergeError, match="was stopped"):
        FisherRaoMerger(checkpoints, args, weights="1-sqrt", callbacks=[Stop]).merge()
    FisherRaoMerger(checkpoints, args, weights="1-sqrt").merge(resume_from_checkpoint=True)
    assert whole.weights == pytest.approx([1 - (2 / 3) ** 0.5, 3**-0.5, (2 / 3) ** 0.5 - 3**-0.5])
    for name, tensor in tensors(tmp_path / "a").items():
        np.testing.assert_array_equal(tensor, tensors(tmp_path / "b")[name])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("lineer", "Did you mean 'linear'"),
        ("ema", "between 0 and 1 behind ema:"),
        ("ema:1", "between 0 and 1 behind ema:"),
        ("ema:x", "between 0 and 1 behind ema:"),
        ("linear:2", "expects numbers, one per expert, or one of"),
        ("0.5,x", "expects a number"),
    ],
)
def test_a_name_that_is_none_is_refused(weights: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ExpertArguments(["a", "b"], weights=weights)


def family_of_norms(folder: Path, norms: tuple[float, ...]) -> tuple[str, list[str]]:
    """A base, and experts whose deltas have these norms over the whole model."""
    base = random_model(0)
    experts = []
    for seed, norm in enumerate(norms):
        delta = random_model(seed + 1)
        length = sum(float((value.double() ** 2).sum()) for value in delta.values()) ** 0.5
        model = {name: base[name] + (norm / length) * value for name, value in delta.items()}
        experts.append(write_model(folder / f"e{seed}", {name: value.float() for name, value in model.items()}))
    return write_model(folder / "base", base), experts


@pytest.mark.parametrize("method", ["karcher", "ties", "tsv_m"])
def test_nan_weighs_by_inverse_norms_of_the_deltas_with_any_method(
    frmerge: Frmerge, tmp_path: Path, method: str
) -> None:
    base, experts = family_of_norms(tmp_path, (1.0, 2.0, 4.0))
    out = tmp_path / "out"
    options = ("--base-model", base, "--method", method, "--weights", "nan", "--output-dir", out)
    shown = frmerge("plan", *experts, *options)
    assert "are measured when the merge begins" in " ".join(shown.stdout.split())
    result = frmerge("merge", *experts, *options)
    assert result.exit_code == 0, result.stderr
    norms = [
        sum(float(((tensors(e)[n] - tensors(base)[n]).astype(np.float64) ** 2).sum()) for n in tensors(base)) ** 0.5
        for e in experts
    ]
    inverse = 1 / np.array(norms)
    np.testing.assert_allclose(read_manifest(out).weights, inverse / inverse.sum(), rtol=1e-6)
    assert verify(str(out)).ok and reproduce(str(out)).identical


def write_adapter(folder: Path, rank: int, seed: int) -> tuple[str, np.ndarray]:
    """An adapter of one module, and its dense delta."""
    generator = np.random.default_rng(seed)
    down, up = (generator.normal(size=shape).astype(np.float32) for shape in ((rank, 24), (24, rank)))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    folder.mkdir()
    save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    return str(folder), 6 / rank * (up.astype(np.float64) @ down)


@pytest.mark.parametrize("output", ["adapter", "merged"])
def test_nan_of_adapters_is_that_of_their_dense_deltas(tmp_path: Path, output: str) -> None:
    base = write_model(tmp_path / "base", random_model(0))
    adapters, deltas = zip(*(write_adapter(tmp_path / f"a{rank}", rank, seed=rank) for rank in (1, 2, 4)))
    args = MergingArguments(output_dir=str(tmp_path / "out"), adapter_output=output)
    merger = FisherRaoMerger(adapters, args, weights="nan", base_model=base if output == "merged" else None).merge()
    inverse = np.array([1 / np.linalg.norm(delta) for delta in deltas])
    np.testing.assert_allclose(merger.weights, inverse / inverse.sum(), rtol=1e-6)


def test_nan_needs_a_base(tmp_path: Path) -> None:
    base, experts = family_of_norms(tmp_path, (1.0, 2.0))
    args = MergingArguments(output_dir=str(tmp_path / "out"))
    with pytest.raises(ArgumentError, match="pass base_model"):
        FisherRaoMerger(experts, args, weights="nan").merge()
    FisherRaoMerger(experts, args, weights="nan", base_model=base).merge()  # what the message says


def test_an_expert_that_is_the_base_has_no_share(tmp_path: Path) -> None:
    base, experts = family_of_norms(tmp_path, (1.0, 2.0))
    twin = write_model(tmp_path / "twin", {n: torch.from_numpy(t.copy()) for n, t in tensors(base).items()})
    merger = FisherRaoMerger(
        [*experts, twin], MergingArguments(output_dir=str(tmp_path / "out")), weights="nan", base_model=base
    ).merge()
    np.testing.assert_allclose(merger.weights, [2 / 3, 1 / 3, 0], rtol=1e-5)


def test_invariants_of_nan() -> None:
    assert norm_aware_weights([3.0, 3.0]) == [0.5, 0.5]
    assert norm_aware_weights([0.0, 0.0, 0.0]) == [1 / 3] * 3
    few, many = norm_aware_weights([1.0, 5.0, 2.0]), norm_aware_weights([1e-200, 5e-200, 2e-200])
    assert few == pytest.approx(many) and sum(few) == pytest.approx(1)
    assert few == pytest.approx([10 / 17, 2 / 17, 5 / 17])
