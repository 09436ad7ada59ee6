"""Data of a report, read from the record of a merge and, if there is one, of its evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.evaluation.models.names import models_of_merge
from hf_frmerge.evaluation.record import EvaluationRecord, load_record
from hf_frmerge.merging.arguments.weight_rules import layer_index
from hf_frmerge.merging.decisions import Geometry as TensorGeometry
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE, read_coefficients
from hf_frmerge.merging.record.manifest import Manifest, read_manifest
from hf_frmerge.wording.geometry import Geometry


@dataclass(frozen=True)
class TensorFacts:
    """
    One tensor of the merge.

    Attributes:
        layer: index of its layer; `None` for tensors outside the layers, such as the embedding.
        kind: name without the layer's number and the prefix shared by all layers, such as `mlp.up_proj`.
        geometry: angles and norms of the experts; `None` if it was copied, or merged without measuring.
        coefficients: `(experts,)`, float64, mean over its blocks; `None` if it is not a linear combination.
    """

    name: str
    layer: int | None
    kind: str
    action: str
    n_blocks: int
    geometry: TensorGeometry | None
    coefficients: NDArray[np.float64] | None


@dataclass(frozen=True)
class MergeFacts:
    """
    A merge and its evaluation.

    Attributes:
        name: name of the folder.
        experts: names as in an evaluation record, in the order of the weights.
        record: `None` if the merge was not evaluated.
    """

    name: str
    manifest: Manifest
    experts: list[str]
    tensors: list[TensorFacts]
    record: EvaluationRecord | None

    @property
    def merged_tensors(self) -> list[TensorFacts]:
        """Tensors that were merged and not copied."""
        return [tensor for tensor in self.tensors if tensor.action == "merge"]

    @property
    def measured_tensors(self) -> list[TensorFacts]:
        """Merged tensors with angles and norms: not every method measures them."""
        return [tensor for tensor in self.tensors if tensor.geometry is not None]

    @property
    def totals(self) -> Geometry:
        """Angles and norms over all merged tensors."""
        return Geometry.of_manifest(self.manifest)


def read_facts(folder: Path | str) -> MergeFacts:
    """
    Read the records of a merge and of its evaluation from a folder.

    Raises:
        CheckpointError: If the folder is not a finished merge, or a record is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    coefficients = read_coefficients(folder).rows if (folder / COEFFICIENTS_FILE).exists() else {}
    kinds = _kinds(manifest.tensors)
    tensors = [
        TensorFacts(
            name,
            layer_index(name),
            kinds[name],
            tensor.action,
            tensor.n_blocks,
            tensor.geometry,
            coefficients[name].mean(axis=0) if name in coefficients else None,
        )
        for name, tensor in manifest.tensors.items()
    ]
    experts = list(models_of_merge([expert.name for expert in manifest.experts])[0])
    return MergeFacts(folder.resolve().name, manifest, experts, tensors, load_record(folder))


def _kinds(names: Iterable[str]) -> dict[str, str]:
    """
    Map tensors to kinds.

    Numbers after the layer's, such as those of the experts in a mixture, become `*`: a report with a row for each of
    128 would be unreadable.
    """
    parts = {name: name.removesuffix(".weight").split(".") for name in names}
    layered = [part for name, part in parts.items() if layer_index(name) is not None]
    heads = {tuple(part[: _first_number(part)]) for part in layered}
    kinds = {}
    for name, part in parts.items():
        index = _first_number(part)
        # A model with an encoder and a decoder has two prefixes, and needs them to tell its tensors apart.
        head = part[:index] if len(heads) > 1 or index == len(part) else []
        tail = ["*" if piece.isdigit() else piece for piece in part[index + 1 :]]
        kinds[name] = ".".join([*head, *tail]) or "layer"
    return kinds


def _first_number(parts: Sequence[str]) -> int:
    """Return the index of the first part that is a number; the number of parts if there is none."""
    return next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
