"""Evaluate classifiers of text or images, which choose one label a row; the counterpart of `suite`."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import EvalPrediction

from hf_frmerge.checkpoints.resolve import Source, resolve
from hf_frmerge.evaluation.measures.classification import (
    class_log_probabilities,
    classes_of,
    classification_metrics,
    compare_classes,
    label_log_probabilities,
    predict_classes,
)
from hf_frmerge.evaluation.measures.collapse import ActivationStatistics
from hf_frmerge.evaluation.measures.function_distance import objective, summarise
from hf_frmerge.evaluation.measures.prediction_loop import LoopOptions
from hf_frmerge.evaluation.models.loading import ModelLoader
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, LayerActivations, Score
from hf_frmerge.evaluation.suite.build_record import recovery_rows
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.text.token_blocks import Rows

if TYPE_CHECKING:
    from hf_frmerge.evaluation.measures.token_tables import TokenTable


def evaluate_classifiers(
    models: ModelSet,
    domains: Mapping[str, Rows],
    options: SuiteOptions | None = None,
    run: RunSettings | None = None,
) -> EvaluationRecord:
    """
    Measure accuracy, loss, function distances and activations of classifiers with the same labels.

    Each sample is one prediction, so `n_tokens` of a distance or an objective is the number of samples.

    Args:
        models, domains, options, run:
            As for `evaluate_suite`; rows need a label (see `ClassificationCollator`). Only the options `batch_size`,
            `dtype` and `device_map` are used. Results are not cached on disk.

    Raises:
        ArgumentError: If a model does not choose one label per row, or a row does not fit it.
    """
    options, run = options or SuiteOptions(), run or RunSettings()
    settings = {"dtype": str(options.dtype), "task": "classification"}
    record = EvaluationRecord(models=dict(models.roles), settings=settings)
    record.weights = _weights(record.experts, models.weights)
    # All models are resolved before the first is loaded, so that a wrong name fails at once.
    loader, specs = _find_models(models, options)
    known = run.classifiers if run.classifiers is not None else {}
    predictions: dict[str, dict[str, EvalPrediction]] = {}
    classes: list[str] | None = None
    for name, spec in specs.items():
        if isinstance(spec, Source) and name in known:
            measured = known[name]
        else:
            if run.on_model is not None:
                run.on_model(name)
            model: Any = loader.load(spec) if isinstance(spec, Source) else spec
            measured = _measure(name, model, classes, domains, models.processing_class, options, run)
            if isinstance(spec, Source):
                known[name] = measured
                loader.release(model)
            del model  # before the next is loaded, so that only one is in memory
        classes = classes or measured.classes  # the first model's: columns of all, and numbers of the labels
        predictions[name] = measured.predictions
        record.layers += measured.layers
        for domain, prediction in measured.predictions.items():
            metrics = classification_metrics(prediction)
            record.scores.append(Score(name, domain, metrics, n_samples=len(prediction.label_ids)))
            if run.on_log_probs is not None:
                run.on_log_probs(name, domain, label_log_probabilities(prediction))
    record.recovery = recovery_rows(record)
    for domain in domains:
        _compare(record, domain, {name: class_log_probabilities(p[domain]) for name, p in predictions.items()})
    return record


@dataclass(frozen=True)
class _Measured:
    """
    What one classifier does.

    Attributes:
        predictions: domain -> its predictions.
        layers: its activations.
        classes: names of its labels; `None` if they are only numbers.
    """

    predictions: dict[str, EvalPrediction]
    layers: list[LayerActivations]
    classes: list[str] | None


def _measure(
    name: str,
    model: Any,
    classes: list[str] | None,
    domains: Mapping[str, Rows],
    processing_class: Any,
    options: SuiteOptions,
    run: RunSettings,
) -> _Measured:
    """Run a classifier over all datasets; the columns of its predictions are `classes`, or else its own."""
    own = classes_of(model)
    activations = ActivationStatistics()
    predictions = {
        domain: predict_classes(
            model,
            rows,
            processing_class,
            batch_size=options.batch_size,
            num_workers=run.num_workers,
            accelerator=run.accelerator,
            loop=LoopOptions(activations=activations, on_prediction_step=run.on_prediction_step),
            classes=classes or own,
        )
        for domain, rows in domains.items()
    }
    activations.reduce(run.accelerator)
    return _Measured(predictions, activations.results(name), own)


def _find_models(models: ModelSet, options: SuiteOptions) -> tuple[ModelLoader, dict[str, Source | torch.nn.Module]]:
    """Resolve every model that is not in memory, and the base of adapters."""
    find = partial(resolve, token=models.token, allow_pickle=models.allow_pickle)
    specs = {
        name: spec if isinstance(spec, torch.nn.Module) else find(str(spec)) for name, spec in models.specs.items()
    }
    base = find(str(models.base_model)) if models.base_model is not None else None
    return ModelLoader(base, options.dtype, options.device_map), specs


def _weights(experts: list[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return the weights of the experts, 1 by default, scaled to sum to 1."""
    unscaled = {name: (weights or {}).get(name, 1.0) for name in experts}
    total = sum(unscaled.values())
    return {name: weight / total for name, weight in unscaled.items()}


def _compare(record: EvaluationRecord, domain: str, log_probs: Mapping[str, NDArray[np.float64]]) -> None:
    """Add the distances merged-to-other and expert-to-expert, and the objective, of one dataset."""
    others = [name for name in log_probs if name != MERGED]
    pairs = [(MERGED, name) for name in others] if MERGED in log_probs else []
    pairs += [(two, one) for one, two in itertools.combinations(record.experts, 2) if {one, two} <= log_probs.keys()]
    # `summarise` and `objective` read tables; those of a classifier are small enough to write again each time.
    with tempfile.TemporaryDirectory(prefix="frmerge-classes-") as folder:
        tables: dict[tuple[str, str], TokenTable] = {}
        for number, (model, other) in enumerate(pairs):
            table = compare_classes(Path(folder) / f"{number}.safetensors", log_probs[model], log_probs[other])
            tables[model, other] = table
            record.distances.append(summarise(model, other, domain, table))
        if MERGED in log_probs and record.experts:
            record.objectives.append(objective(domain, record.experts, record.weights, tables))
        for table in tables.values():
            table.close()
