"""Scores of the merged model as `model-index` entries, which the Hub shows beside the card."""

from __future__ import annotations

import math
import re
from typing import Any

from hf_frmerge.evaluation.headlines import headlines
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.wording.metrics import is_error, metric_of

_ALL = "all texts of the evaluation"


def model_index(record: EvaluationRecord, model_name: str, pipeline_tag: str | None) -> list[dict[str, Any]]:
    """
    Return the headline scores of the merged model and its recovery of each expert; values not finite are left out.

    Args:
        record (`EvaluationRecord`):
            Record of the evaluation.
        model_name (`str`):
            Name that the Hub shows beside them.
        pipeline_tag (`str`, *optional*):
            Task of the model; `other` by default.

    Returns:
        `list[dict[str, Any]]`: Value of `model-index` in the front matter; empty if there is no score.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [(headline.domain or _ALL, headline.name, headline.value) for headline in headlines(record)]
    results = [row for row in results if not (row[1].startswith("recovery") or is_error(row[1]))]
    # Recovery comes from the record and not from the headlines: the Hub should get it per expert, as a share.
    shares = {
        (row.domain, f"recovery_{row.expert}"): row.share
        for row in record.recovery
        if row.model == MERGED and row.share is not None
    }
    results += [(domain, name, share) for (domain, name), share in shares.items()]
    scores = [
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
    return eval_results_to_model_index(model_name, scores) if scores else []
