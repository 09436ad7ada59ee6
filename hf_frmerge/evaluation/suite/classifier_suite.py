"""Measure sequence classifiers together: the counterpart of `suite` for models that choose one label a row."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.evaluation.measures.classification import (
    class_log_probabilities,
    classification_metrics,
    compare_classes,
    predict_classes,
)
from hf_frmerge.evaluation.measures.collapse import ActivationStatistics
from hf_frmerge.evaluation.measures.function_distance import objective, summarise
from hf_frmerge.evaluation.models.loading import ModelLoader
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, Role, Score
from hf_frmerge.evaluation.suite.build_record import recovery_rows
from hf_frmerge.evaluation.suite.suite import SuiteOptions
from hf_frmerge.evaluation.text.token_blocks import Rows

if TYPE_CHECKING:
    from hf_frmerge.evaluation.measures.token_tables import TokenTable


def evaluate_classifiers(
    models: Mapping[str, str | Path | torch.nn.Module],
    domains: Mapping[str, Rows],
    *,
    roles: Mapping[str, Role],
    weights: Mapping[str, float] | None = None,
    base_model: str | Path | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    options: SuiteOptions | None = None,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    token: str | None = None,
    on_model: Callable[[str], object] | None = None,
    on_prediction_step: Callable[[DataLoader], None] | None = None,
) -> EvaluationRecord:
    """
    Measure accuracy, loss, function distance and activations of classifiers with the same labels.

    A sample counts as one prediction: where the record says tokens of a distance or an objective, it means samples.

    Args:
        models, domains, roles, weights, base_model, processing_class, options, accelerator, token, on_model,
        on_prediction_step:
            As for `evaluate_suite`; rows have a label (see `ClassificationCollator`). Of the options, `batch_size`,
            `dtype` and `device_map` matter.
        num_workers (`int`, *optional*, defaults to `0`):
            Processes that load data.

    Raises:
        ArgumentError: If a model is no such classifier, or a row does not fit it.
    """
    accelerator, options = accelerator or Accelerator(), options or SuiteOptions()
    record = EvaluationRecord(models=dict(roles), settings={"dtype": str(options.dtype), "task": "classification"})
    record.weights = _weights(record.experts, weights)
    # All are looked up before the first is loaded, so that a wrong name fails at once.
    sources = {n: resolve(str(m), token=token) for n, m in models.items() if not isinstance(m, torch.nn.Module)}
    base = resolve(str(base_model), token=token) if base_model is not None else None
    loader = ModelLoader(base, options.dtype, options.device_map)
    predictions: dict[str, dict[str, EvalPrediction]] = {}
    for name, source in models.items():
        if on_model is not None:
            on_model(name)
        model: Any = source
        if not isinstance(source, torch.nn.Module):
            model = loader.load(sources[name])
        activations = ActivationStatistics()
        predictions[name] = {
            domain: predict_classes(
                model,
                rows,
                processing_class,
                batch_size=options.batch_size,
                num_workers=num_workers,
                accelerator=accelerator,
                activations=activations,
                on_prediction_step=on_prediction_step,
            )
            for domain, rows in domains.items()
        }
        activations.reduce(accelerator)
        record.layers += activations.results(name)
        for domain, prediction in predictions[name].items():
            metrics = classification_metrics(prediction)
            record.scores.append(Score(name, domain, metrics, n_samples=len(prediction.label_ids)))
        if model is not source:
            loader.release(model)
        del model
    record.recovery = recovery_rows(record)
    for domain in domains:
        _compare(record, domain, {name: class_log_probabilities(p[domain]) for name, p in predictions.items()})
    return record


def _weights(experts: list[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    given = {name: (weights or {}).get(name, 1.0) for name in experts}
    total = sum(given.values())
    return {name: weight / total for name, weight in given.items()}


def _compare(record: EvaluationRecord, domain: str, log_probs: Mapping[str, NDArray[np.float64]]) -> None:
    """Add the distances of the merged model from the others, of the experts from each other, and the objective."""
    others = [name for name in log_probs if name != MERGED]
    asked = [(MERGED, name) for name in others] if MERGED in log_probs else []
    asked += [(two, one) for one, two in itertools.combinations(record.experts, 2) if {one, two} <= log_probs.keys()]
    with tempfile.TemporaryDirectory(prefix="frmerge-classes-") as folder:
        tables: dict[tuple[str, str], TokenTable] = {}
        for number, (model, other) in enumerate(asked):
            table = compare_classes(Path(folder) / f"{number}.safetensors", log_probs[model], log_probs[other])
            tables[model, other] = table
            record.distances.append(summarise(model, other, domain, table))
        if MERGED in log_probs and record.experts:
            record.objectives.append(objective(domain, record.experts, record.weights, tables))
        for table in tables.values():
            table.close()
