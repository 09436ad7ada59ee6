"""The merged model's own numbers as `model-index` entries, which the Hub shows beside the card."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from hf_frmerge.evaluation.headlines import headlines
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.hub.metrics import is_error, metric_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_ALL = "all texts of the evaluation"
_NAMES = {
    "fisher_rao": "Fisher-Rao distance to the farthest expert (rad)",
    "top1_agreement": "Same first guess as the farthest expert",
    "objective": "Mean squared Fisher-Rao distance to the experts (rad^2)",
    "to_barycentre": "Fisher-Rao distance to the barycentre of the experts (rad)",
    "effective_rank": "Effective rank over that of the experts, worst layer",
    "activation_variance": "Activation variance over that of the experts, worst layer",
    "repetition": "Repeated 4-grams in continuations",
    "entropy": "Entropy of continuations (nats)",
}


def eval_results(record: EvaluationRecord, pipeline_tag: str | None) -> list[EvalResult]:
    """
    Return what was measured of the merged model; numbers that are not finite are left out.

    Args:
        record (`EvaluationRecord`):
            The evaluation.
        pipeline_tag (`str`, *optional*):
            Task of the model.
    """
    from huggingface_hub import EvalResult

    found = [(headline.domain or _ALL, headline.name, headline.value) for headline in headlines(record)]
    found = [row for row in found if not (row[1].startswith("recovery") or is_error(row[1]))]
    shares = {
        (row.domain, f"recovery_{row.expert}"): row.share
        for row in record.recovery
        if row.model == MERGED and row.share is not None
    }
    found += [(domain, name, share) for (domain, name), share in shares.items()]
    return [
        EvalResult(
            task_type=pipeline_tag or "other",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", domain.lower()).strip("-") or "unnamed",
            dataset_name=domain,
            metric_type="recovery" if name.startswith("recovery_") else metric_of(name).hub_type,
            metric_name=_title(name),
            metric_value=float(f"{value:.6g}"),
        )
        for domain, name, value in found
        if math.isfinite(value)
    ]


def _title(name: str) -> str:
    if name.startswith("recovery_"):
        return f"Share kept of what {name.removeprefix('recovery_')} gained over the base"
    return _NAMES.get(name) or metric_of(name).title
