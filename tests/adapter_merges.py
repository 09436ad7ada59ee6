"""Adapters written by PEFT, merged into an adapter by the engine, and what PEFT and the record say of the result."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.decisions import Geometry
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.coefficient_table import read_coefficients
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.run import run_merge


@dataclass(frozen=True)
class RecordedModule:
    """One module, from the record of a merge."""

    target: str
    rank: int
    norm: float
    truncation_error: float
    coefficients: list[float]
    geometry: Geometry

    @property
    def module(self) -> str:
        return self.target.removesuffix(".weight")


@dataclass(frozen=True)
class RecordedAdapter:
    """A merged adapter, from its record."""

    modules: list[RecordedModule]
    truncation_error: float
    notes: list[str]


def merge_adapters(
    folders: Sequence[Path],
    weights: Sequence[float],
    output: Path,
    observer: StepObserver | None = None,
    **options: Any,
) -> RecordedAdapter:
    args = MergingArguments(output_dir=str(output), **options)
    with closing(build_plan([str(folder) for folder in folders], args, weights)) as plan:
        outcome = run_merge(plan, observer or StepObserver(), Processes())
    table = read_coefficients(output).rows
    modules = [
        RecordedModule(
            name, tensor.rank, tensor.norm, tensor.truncation_error, table[name][0].tolist(), tensor.geometry
        )
        for name, tensor in read_manifest(output).tensors.items()
    ]
    assert outcome.report.factors is not None
    return RecordedAdapter(modules, outcome.report.factors.truncation_error, list(outcome.report.notes))


def load_base(folder: Path) -> torch.nn.Module:
    model_class = GPT2LMHeadModel if folder.name == "gpt2" else LlamaForCausalLM
    return model_class.from_pretrained(folder, dtype=torch.float32)


def make_adapter(base: Path, folder: Path, seed: int, dtype: torch.dtype = torch.float32, **config) -> Path:
    """Adapter with random factors of unequal size, written by PEFT."""
    model = get_peft_model(load_base(base), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * (1 + seed % 3)
            parameter.data = values.to(dtype)
    model.save_pretrained(folder)
    return folder


def peft_deltas(base: Path, folder: Path) -> dict[str, np.ndarray]:
    """Dense float64 deltas as PEFT sees the adapter when it loads it, by module path."""
    model = PeftModel.from_pretrained(load_base(base), folder)
    model = model.double()
    return {
        name: module.get_delta_weight("default").detach().numpy()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }
