"""Records of merges that nobody made."""

from __future__ import annotations

from typing import Any

from hf_frmerge.merging.decisions import Geometry
from hf_frmerge.merging.record.manifest import Manifest
from hf_frmerge.merging.record.manifest_entries import Machine, RecordedModel, RecordedTensor
from hf_frmerge.merging.record.summary import MergeReport


def make_manifest(tensors: dict[str, RecordedTensor], weights: tuple[float, ...] = (0.5, 0.5)) -> Manifest:
    """Return the record of a merge of local models `e0`, `e1`, ... with these tensors."""
    report = MergeReport(
        "karcher", "weights", "tensor", None, len(tensors), 0, 0, None, 8, 4, 1.0, 8.0, "native", (), None
    )
    return Manifest(
        hf_frmerge="0.1.0",
        output_kind="full",
        method="karcher",
        space="weights",
        arguments={"block": "tensor", "norm": "mean"},
        experts=tuple(RecordedModel(f"e{i}", False, None, None, "full", {}, w) for i, w in enumerate(weights)),
        base_model=None,
        finished_at="2026-11-25T12:00:00+00:00",
        n_processes=1,
        machine=Machine("x86_64", "Linux"),
        report=report,
        versions={},
        files={},
        tensors=tensors,
    )


def make_geometry(**known: Any) -> Geometry:
    """Return the geometry of two equal points, but for what is given."""
    equal: dict[str, Any] = {
        "norms": (1.0, 1.0),
        "norm_ratio": 1.0,
        "linear_norm_ratio": 1.0,
        "max_angle": 0.0,
        "mean_angle": 0.0,
        "gap_to_nre": 0.0,
        "n_iter": 0,
        "residual": 0.0,
        "unconverged": (),
        "n_ambiguous": 0,
    }
    return Geometry(**{**equal, **known})
