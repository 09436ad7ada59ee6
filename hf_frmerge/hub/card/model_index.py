"""Scores of the merged model as `model-index` entries, which the Hub shows beside the card."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from hf_frmerge.evaluation.headlines import headlines
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.wording.metrics import is_error, metric_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_ALL = "all texts of the evaluation"


def eval_results(record: EvaluationRecord, pipeline_tag: str | None) -> list[EvalResult]:
    """
    Return the headline scores of the merged model and its recovery of each expert; values not finite are left out.

    Args:
        record (`EvaluationRecord`):
            Record of the evaluation.
        pipeline_tag (`str`, *optional*):
            Task of the model; `other` by default.
    """
    from huggingface_hub import EvalResult

    results = [(headline.domain or _ALL, headline.name, headline.value) for headline in headlines(record)]
    results = [row for row in results if not (row[1].startswith("recovery") or is_error(row[1]))]
    # Recovery comes from the record and not from the headlines: the Hub should get it per expert, as a share.
    shares = {
        (row.domain, f"recovery_{row.expert}"): row.share
        for row in record.recovery
        if row.model == MERGED and row.share is not None
    }
    results += [(domain, name, share) for (domain, name), share in shares.items()]
    return [
        EvalResult(
            task_type=pipeline_tag or "other",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", domain.lower()).strip("-") or "unnamed",
            dataset_name=domain,
            metric_type=metric_of(name).hub_type,
            metric_name=metric_of(name).title,
            metric_value=float(f"{value:.6g}"),
        )
        for domain, name, value in results
        if math.isfinite(value)
    ]
