"""A coefficient table in place of a method: the same model from that of another merge, and refusals by name."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import SHAPES, write_family
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge.errors import ArgumentError, CheckpointError, NonFiniteError, ResumeError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

TABLE = "merge_coefficients.safetensors"


def merge(
    experts: Sequence[str], out: Path, base: str | None = None, observer: StepObserver | None = None, **options: Any
) -> Path:
    args = MergingArguments(output_dir=str(out), **options)
    run_merge(build_plan(experts, args, None, base), observer or StepObserver(), Processes())
    return out


@pytest.mark.parametrize("block", ["tensor", "row", "head", "layer", "model"])
@pytest.mark.parametrize("space", ["weights", "deltas"])
def test_the_table_of_a_merge_makes_the_same_model(tmp_path: Path, block: str, space: str) -> None:
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    first = merge(experts, tmp_path / "first", base, block=block, space=space)
    again = merge(experts, tmp_path / "again", base, coefficients=str(first / TABLE))
    for name in ("model.safetensors", TABLE, "config.json"):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    assert verify(str(again)).problems == []


def test_adapters_and_the_folder_of_a_merge(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for seed in range(2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2 + seed, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora).save_pretrained(tmp_path / f"{seed}")
    experts = [str(tmp_path / f"{seed}") for seed in range(2)]
    first = merge(experts, tmp_path / "first")
    again = merge(experts, tmp_path / "again", coefficients=str(first))
    for name in ("adapter_model.safetensors", TABLE):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    assert verify(str(again)).problems == []


def test_any_table_is_a_sum_of_the_experts(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((shape[0] // 8, 3)) for name, shape in SHAPES.items()}
    rows["lm_head.weight"] = rng.standard_normal((1, 3)).astype(np.float32)
    save_file(rows, tmp_path / "mine.safetensors")
    out = merge(experts, tmp_path / "out", base, coefficients=str(tmp_path / "mine.safetensors"), space="deltas")
    models = [load_file(Path(folder) / "model.safetensors") for folder in [base, *experts]]
    for name, merged in load_file(out / "model.safetensors").items():
        table = rows[name].astype(np.float64)
        origin, *others = (m[name].astype(np.float64).reshape(len(table), -1) for m in models)
        expected = origin + sum(table[:, i, None] * (others[i] - origin) for i in range(3))
        np.testing.assert_allclose(merged.reshape(len(table), -1), expected, rtol=1e-6, atol=1e-6)
    # The record needs the table no more: it has its own.
    (tmp_path / "mine.safetensors").unlink()
    shutil.copytree(out, tmp_path / "moved")
    assert verify(str(tmp_path / "moved")).problems == []
    assert reproduce(str(tmp_path / "moved")).identical


class Stop(StepObserver):
    def end(self, outcome: StepOutcome) -> bool:
        return False


def test_a_stopped_merge_resumes_and_another_table_is_another_merge(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path)
    first = merge(experts, tmp_path / "first")
    out = tmp_path / "out"
    merge(experts, out, None, Stop(), coefficients=str(first), num_workers=1)
    assert not (out / "config.json").exists()
    other = dict(load_file(first / TABLE))
    other["lm_head.weight"] = other["lm_head.weight"] * 2
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ResumeError, match=r"started differently: .*coefficients"):
        merge(experts, out, coefficients=str(tmp_path / "other.safetensors"), resume_from_checkpoint=True)
    merge(experts, out, coefficients=str(first), resume_from_checkpoint=True)
    assert (out / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_tables_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    first = merge(experts, tmp_path / "first")
    table = dict(load_file(first / TABLE))
    path = tmp_path / "t.safetensors"

    def refused(error: type[Exception], match: str, rows: dict[str, Any], **options: Any) -> None:
        save_file(rows, path, metadata=options.pop("metadata", None))
        with pytest.raises(error, match=match):
            build_plan(experts, MergingArguments(coefficients=str(path), **options), None, options.pop("base", base))

    without = {name: row for name, row in table.items() if name != "lm_head.weight"}

    def head(row: Any) -> dict[str, Any]:
        return table | {"lm_head.weight": row}

    refused(ArgumentError, r"t.safetensors has no coefficients for lm_head.weight, which would be merged", without)
    refused(ArgumentError, r"has coefficients for new.bias, which is no tensor", table | {"new.bias": np.ones((1, 3))})
    refused(ArgumentError, r"'lm_head.weight' has coefficients for 2 experts, but 3", head(np.ones((1, 2))))
    refused(ArgumentError, r"'lm_head.weight' has 5 rows of coefficients", head(np.ones((5, 3))))
    refused(CheckpointError, r"'lm_head.weight' is I64 of shape", head(np.ones((1, 3), np.int64)))
    refused(NonFiniteError, r"a coefficient of 'lm_head.weight' is not", head(np.full((1, 3), np.inf)))
    of_weights = {"metadata": {"space": "weights"}, "space": "deltas"}
    refused(ArgumentError, r"holds coefficients of weights, but space='deltas'", table, **of_weights)
    with pytest.raises(CheckpointError, match=r"no table of coefficients .*nowhere.merge_coefficients"):
        build_plan(experts, MergingArguments(coefficients=str(tmp_path / "nowhere")))
    with pytest.raises(ArgumentError, match=r"`method='nre'` and `coefficients=.*do not go together"):
        MergingArguments(method="nre", coefficients=str(path))
    with pytest.raises(ArgumentError, match=r"`method='given'` and `coefficients=None`"):
        MergingArguments(method="given")
