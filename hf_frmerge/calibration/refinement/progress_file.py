"""Keep the state of a refinement in one file, so that it goes on to the same bits after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_frmerge.calibration.kept_files import damaged, tensors_digest
from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.checkpoints.tensors.layout import ShardLayout
from hf_frmerge.merging.engine.journal import read_signed_line, signed_line

_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
_FACTS = "facts"  # name no tensor has, as theirs begin with what they are of


@dataclass(frozen=True)
class Best:
    """
    The point nearest to the experts of those that were judged.

    Attributes:
        corrections: what is added to the merge without data, in the dtypes they are stored in.
        distances: squared distance to every expert on its held-out prompts; `None` if it has none.
        step: number of steps that led there.
    """

    corrections: dict[str, Tensor]
    distances: tuple[float | None, ...]
    step: int


@dataclass(frozen=True)
class Progress:
    """
    How far a refinement is.

    Attributes:
        step: number of steps taken.
        values: the corrections, float32.
        first, second: the optimiser's running means of their gradients, and of the squares.
        best: the best point so far.
    """

    step: int
    values: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    best: Best


def write_progress(path: Path, progress: Progress) -> None:
    """Write the file, in place of an earlier one."""
    groups = {
        "values": progress.values, "first": progress.first, "second": progress.second,
        "best": progress.best.corrections,
    }  # fmt: skip
    tensors = {f"{group}.{name}": values for group, members in groups.items() for name, values in members.items()}
    facts = {
        "step": progress.step, "best_step": progress.best.step, "distances": progress.best.distances,
        "digest": tensors_digest(tensors),
    }  # fmt: skip
    tensors[_FACTS] = torch.frombuffer(bytearray(signed_line(facts)), dtype=torch.uint8)
    write_tensors(path, tensors)


def read_progress(path: Path, device: torch.device) -> Progress | None:
    """Return what `write_progress` wrote; `None` if there is no such file. Raises `ResumeError` if it was altered."""
    if not path.exists():
        return None
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise damaged(path, error) from error
    line = tensors.pop(_FACTS, None)
    facts = read_signed_line(bytes(line.tolist())) if line is not None else None
    if facts is None or facts["digest"] != tensors_digest(tensors):
        raise damaged(path, "its digest is of other content")
    groups: dict[str, dict[str, Tensor]] = {"values": {}, "first": {}, "second": {}, "best": {}}
    for name, values in tensors.items():
        group, _, member = name.partition(".")
        groups[group][member] = values
    best = Best(groups.pop("best"), tuple(facts["distances"]), facts["best_step"])
    return Progress(facts["step"], **groups, best=best)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, tensor by tensor: all of them are several times the model."""
    (shard,) = ShardLayout.plan([(n, _CODES[v.dtype], tuple(v.shape)) for n, v in tensors.items()], 1 << 62).shards
    parts = (
        tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data for name in shard.names
    )
    write_file(path, chain([shard.header], parts))
