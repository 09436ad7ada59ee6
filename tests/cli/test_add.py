"""`frmerge add`: what it writes is what `add_expert` writes, from the record of a merge alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from merge_reference import write_family
from safetensors.torch import load_file

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.merging.record.manifest import MANIFEST_FILE, read_manifest
from hf_frmerge.weighting.continual import read_before
from tests.tiny_models import save_llama_family

Run = Callable[..., Result]
WAYS = {
    "karcher": {"method": "karcher", "norm": "median"},
    "karcher in deltas": {"method": "karcher", "space": "deltas", "scale": 1.2},
    "opcm": {"method": "opcm", "density": 0.8},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_the_same_bits_as_add_expert(frmerge: Run, tmp_path: Path, options: dict[str, object]) -> None:
    base, experts = write_family(tmp_path, 4)
    args = MergingArguments(output_dir=str(tmp_path / "two"), **options)
    merger = FisherRaoMerger(experts[:2], args, base_model=base).merge()
    for before, name, expert in (("two", "three", experts[2]), ("three", "four", experts[3])):
        merger = merger.add_expert(expert, str(tmp_path / f"{name}-python"))
        # The chain of commands goes on with what commands wrote.
        source = tmp_path / (before if before == "two" else f"{before}-command")
        result = frmerge("add", source, expert, "--output-dir", tmp_path / f"{name}-command")
        assert result.exit_code == 0, result.output
        bits = [(tmp_path / f"{name}-{way}" / "model.safetensors").read_bytes() for way in ("python", "command")]
        assert bits[0] == bits[1]
    assert read_before(str(tmp_path / "four-command")).n_experts == 4
    recorded = read_manifest(tmp_path / "four-command").arguments
    assert all(recorded[name] == value for name, value in options.items())


def test_adapters_stay_adapters(frmerge: Run, models, tmp_path: Path) -> None:
    args = MergingArguments(output_dir=str(tmp_path / "two"))
    merger = FisherRaoMerger([models.adapter, models.adapter_2], args, base_model=models.base).merge()
    merger.add_expert(models.adapter, str(tmp_path / "python"))
    assert frmerge("add", tmp_path / "two", models.adapter, "--output-dir", tmp_path / "command").exit_code == 0
    bits = [(tmp_path / way / "adapter_model.safetensors").read_bytes() for way in ("python", "command")]
    assert bits[0] == bits[1]


def test_another_method_and_json(frmerge: Run, tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 3)
    args = MergingArguments(output_dir=str(tmp_path / "two"), method="opcm")
    merger = FisherRaoMerger(experts[:2], args, base_model=base).merge()
    merger.args.density = None  # of opcm alone
    merger.add_expert(experts[2], str(tmp_path / "python"), method="linear")
    options = ["--method", "linear", "--output-dir", tmp_path / "command"]
    result = frmerge("add", tmp_path / "two", experts[2], *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["complete"]
    bits = [(tmp_path / way / "model.safetensors").read_bytes() for way in ("python", "command")]
    assert bits[0] == bits[1]


def test_a_base_that_moved_is_named(frmerge: Run, tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 3)
    args = MergingArguments(output_dir=str(tmp_path / "two"), space="deltas")
    FisherRaoMerger(experts[:2], args, base_model=base).merge()
    moved = str(tmp_path / "moved")
    shutil.move(base, moved)
    for expert in experts[:2]:
        shutil.rmtree(expert)  # they are in the merge, and not needed
    command = ["add", tmp_path / "two", experts[2], "--output-dir", tmp_path / "three"]
    refused = frmerge(*command)
    assert refused.exit_code == 1 and "is no longer in" in refused.stderr
    assert not (tmp_path / "three").exists()
    assert frmerge(*command, "--base-model", moved).exit_code == 0  # what the message says


def test_what_was_said_of_other_experts_is_not_taken_over(
    frmerge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, experts = write_family(tmp_path, 3)
    args = MergingArguments(output_dir="two", weight_rules=["mlp=1,0"])
    FisherRaoMerger(experts[:2], args).merge()
    refused = frmerge("add", "two", experts[2], "--output-dir", "three")
    assert refused.exit_code == 2 and "was merged with weight_rules" in refused.stderr
    advice = refused.stderr.partition("frmerge ")[2].rstrip().rstrip(".").replace("EXPERT", experts[2])
    assert frmerge(*advice.split(), "--output-dir", "three").exit_code == 0
    assert read_before("three").n_experts == 3


def test_a_model_that_is_no_merge(frmerge: Run, tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    refused = frmerge("add", *experts, "--output-dir", tmp_path / "out")
    assert refused.exit_code == 1 and MANIFEST_FILE in refused.stderr


def test_what_was_fitted_to_prompts_needs_prompts_again(frmerge: Run, tmp_path: Path) -> None:
    """Without it is merged without them, and told so; with them its options, a refinement among them, are kept."""
    save_llama_family(tmp_path, [f"w{number}" for number in range(40)], spread=0.2)
    base, *experts = (str(tmp_path / name) for name in ("base", "math", "code"))
    rows = np.random.default_rng(0).integers(0, 40, (12, 8)).tolist()
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    prompts = ["--calibration", tmp_path / "prompts.jsonl"]
    fit = ["--method", "linear", "--max-calibration-length", 8, "--calibration-form", "dense", "--refine", 2]
    loss = ["--refine-loss", "reverse_kl"]
    merge = ["merge", *experts, "--base-model", base, *fit, *loss, *prompts, "--output-dir", tmp_path / "two"]
    assert frmerge(*merge).exit_code == 0
    command = ["add", tmp_path / "two", experts[0]]

    bare = frmerge(*command, "--output-dir", tmp_path / "bare")
    assert bare.exit_code == 0 and "it is made without, and without refine_steps=2. Pass some" in bare.stderr
    assert read_manifest(tmp_path / "bare").calibration is None
    expected = 2 / 3 * tensor(tmp_path / "two") + 1 / 3 * tensor(Path(experts[0]))
    torch.testing.assert_close(tensor(tmp_path / "bare"), expected, rtol=1e-2, atol=1e-3)

    fitted = frmerge(*command, *prompts, "--output-dir", tmp_path / "fitted")  # what the message says
    assert fitted.exit_code == 0 and "made without" not in fitted.stderr
    manifest = read_manifest(tmp_path / "fitted")
    assert manifest.calibration is not None and manifest.calibration.refinement is not None
    assert manifest.calibration.refinement.steps == 2 and manifest.calibration.refinement.loss == "reverse_kl"
    assert manifest.weights == pytest.approx([2 / 3, 1 / 3])

    assert not frmerge(*command, *prompts, "--refine", 0, "--output-dir", tmp_path / "plain").exception
    plain = read_manifest(tmp_path / "plain").calibration
    assert plain is not None and plain.refinement is None


def test_add_expert_takes_prompts_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_llama_family(tmp_path, [f"w{number}" for number in range(40)], spread=0.2)
    base, *experts = (str(tmp_path / name) for name in ("base", "math", "code"))
    rows = np.random.default_rng(0).integers(0, 40, (12, 8)).tolist()
    args = MergingArguments(
        output_dir=str(tmp_path / "two"), method="linear", max_calibration_length=8, refine_steps=2
    )
    merger = FisherRaoMerger(experts, args, base_model=base, calibration_dataset=rows).merge()
    bare = merger.add_expert(experts[0], str(tmp_path / "bare"))
    assert "without refine_steps=2" in caplog.text and bare.manifest is not None
    assert bare.manifest.calibration is None
    fitted = merger.add_expert(experts[0], str(tmp_path / "fitted"), calibration_dataset=rows)
    assert fitted.manifest is not None and fitted.manifest.calibration is not None
    assert fitted.manifest.calibration.refinement is not None


def tensor(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
