"""Evaluate one merge: the merged model and what it was made of, on the datasets of a user."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedTokenizerBase
from transformers.trainer_utils import denumpify_detensorize, speed_metrics

from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.evaluation.measures.classification import is_classifier, predict_classes
from hf_frmerge.evaluation.measures.prediction_loop import Preprocess, predict
from hf_frmerge.evaluation.models.merged import architecture_of, tokenizer_of, whole_model
from hf_frmerge.evaluation.models.names import models_of_merge
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, Role
from hf_frmerge.evaluation.suite.classifier_suite import evaluate_classifiers
from hf_frmerge.evaluation.suite.suite import SuiteOptions, evaluate_suite
from hf_frmerge.evaluation.text.batches import batches_of
from hf_frmerge.evaluation.text.forward import blocks_for
from hf_frmerge.evaluation.text.token_blocks import Rows, collate
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

Model = str | torch.nn.Module


@dataclass(frozen=True)
class UserMetrics:
    """
    What a user computes of the merged model's predictions, as for `transformers.Trainer`.

    Predictions of a language model are the logits `(n, T, V)` of all blocks (or rows), and labels are their tokens: a
    label is predicted by the position before it. Use `preprocess_logits` to keep less of them.

    Attributes:
        model: returns the merged model, on which the datasets are run once more.
        compute: called with an `EvalPrediction`, returns metrics by name.
        preprocess_logits: called with predictions and labels of each batch; what it returns is kept in their place.
        ignore_keys: outputs of the model that are no predictions.
    """

    model: Callable[[], Any]
    compute: Callable[[EvalPrediction], dict[str, float]]
    preprocess_logits: Preprocess | None = None
    ignore_keys: list[str] | None = None


@dataclass(frozen=True)
class _Means:
    """With what datasets are run."""

    tokenizer: PreTrainedTokenizerBase | None
    options: SuiteOptions
    accelerator: Accelerator
    num_workers: int
    on_prediction_step: Callable[[DataLoader], None] | None


def evaluate_merge(
    models: Mapping[str, Model],
    domains: Mapping[str, Rows],
    *,
    roles: Mapping[str, Role],
    weights: Mapping[str, float] | None = None,
    base_model: str | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    options: SuiteOptions | None = None,
    user_metrics: UserMetrics | None = None,
    cache_dir: str | Path | None = None,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    token: str | None = None,
    on_model: Callable[[str], object] | None = None,
    on_prediction_step: Callable[[DataLoader], None] | None = None,
) -> EvaluationRecord:
    """
    Measure sequence classifiers by `evaluate_classifiers`, other models by `evaluate_suite`.

    Args:
        models (`Mapping[str, str | torch.nn.Module]`):
            Name -> folder, Hub id or loaded model. Models that are not loaded are loaded one at a time.
        domains (`Mapping[str, Rows]`):
            Name -> `Dataset`, `IterableDataset` or any rows.
        roles (`Mapping[str, Role]`):
            Of every model; the merged one is named `"merged"`.
        base_model (`str`, *optional*):
            What adapters are put on; by default what their configuration names.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer; by default that of the merged model, or else of the first one that has any.
        user_metrics (`UserMetrics`, *optional*):
            Added to the scores of the merged model.
        num_workers (`int`, *optional*, defaults to `0`):
            Processes that load the rows of classifiers.
        weights, options, cache_dir, accelerator, token, on_model, on_prediction_step:
            As for `evaluate_suite`.

    Raises:
        ArgumentError: If a dataset does not fit the models.
    """
    sources = {name: resolve(model, token=token) for name, model in models.items() if isinstance(model, str)}
    base = base_model or next(
        (whole_model(s.path, token=token) for s in sources.values() if s.kind == "adapter"), None
    )
    named = MERGED if MERGED in models else next(iter(models), None)
    if processing_class is None:
        folders = [whole_model(sources[name].path, base, token) for name in (named, *sources) if name in sources]
        processing_class = next(filter(None, map(tokenizer_of, folders)), None)
    means = _Means(
        processing_class,
        options or SuiteOptions(),
        accelerator or Accelerator(),
        num_workers,
        on_prediction_step,
    )
    shared: dict[str, Any] = {
        "roles": roles,
        "weights": weights,
        "base_model": base,
        "processing_class": means.tokenizer,
        "options": means.options,
        "accelerator": means.accelerator,
        "token": token,
        "on_model": on_model,
        "on_prediction_step": on_prediction_step,
    }
    if named in sources:
        architecture = architecture_of(whole_model(sources[named].path, base, token))
    else:
        architecture = type(models.get(named or "")).__name__
    if is_classifier(architecture):
        record = evaluate_classifiers(models, domains, num_workers=num_workers, **shared)
    else:
        record = evaluate_suite(models, domains, cache_dir=cache_dir, **shared)
    if user_metrics is not None and MERGED in models:
        model = user_metrics.model()
        for domain, rows in domains.items():
            predict_rows = _predict_classes if is_classifier(architecture) else _predict_tokens
            found = user_metrics.compute(predict_rows(model, rows, user_metrics, means))
            _add_metrics(record, domain, denumpify_detensorize(found))
    return record


def evaluate_with(
    args: MergingArguments,
    experts: Sequence[str],
    weights: Sequence[float] | None,
    base_model: str | None,
    domains: Mapping[str, Rows],
    *,
    merged: Model | None,
    processing_class: PreTrainedTokenizerBase | None,
    user_metrics: UserMetrics | None,
    on_prediction_step: Callable[[DataLoader], None],
) -> tuple[EvaluationRecord, dict[str, float]]:
    """
    Measure the models of a merge as its options say, and how long it took.

    Args:
        args (`MergingArguments`):
            Options.
        experts, weights, base_model, domains, processing_class, user_metrics, on_prediction_step:
            As for `evaluate_merge`.
        merged (`str` or `torch.nn.Module`, *optional*):
            Folder of the merged model, or the model; without it the experts alone are measured.

    Returns:
        The record, and `runtime` in seconds, `samples_per_second`, `steps_per_second` as `Trainer` has them: a sample
        is a row or a block read by a model, so what was found in the cache does not count.
    """
    if merged is None or args.evaluate_experts:
        models, roles = models_of_merge(experts, base_model, merged)
    else:
        models, roles = models_of_merge([], None, merged)
    names = [name for name, role in roles.items() if role == "expert"]
    started, steps = time.time(), 0
    run: list[str] = []

    def heard(loader: DataLoader) -> None:
        nonlocal steps
        steps += 1
        on_prediction_step(loader)

    if processing_class is None and MERGED in models:
        processing_class = tokenizer_of(whole_model(args.output_dir, base_model, args.hub_token))
    dtype = args.eval_dtype
    for model in models.values():
        if isinstance(model, torch.nn.Module) and dtype != "auto":
            model.to(getattr(torch, dtype))
    record = evaluate_merge(
        models,
        domains,
        roles=roles,
        weights=dict(zip(names, weights)) if weights and names else None,
        user_metrics=user_metrics,
        base_model=base_model,
        processing_class=processing_class,
        options=SuiteOptions(
            batch_size=args.per_device_eval_batch_size,
            block_size=args.eval_block_size,
            packing=args.eval_packing,
            dtype=dtype,
            device_map=args.device_map,
        ),
        num_workers=args.dataloader_num_workers,
        accelerator=Accelerator(cpu=args.use_cpu),
        token=args.hub_token,
        on_model=run.append,
        on_prediction_step=heard,
    )
    block = record.settings.get("block_size", 2)
    samples = {score.domain: score.n_samples or -(-score.n_tokens // (block - 1)) for score in record.scores}
    speed = speed_metrics("", started, num_samples=len(run) * sum(samples.values()), num_steps=steps)
    return record, {name.removeprefix("_"): value for name, value in speed.items()}


def _predict_classes(model: Any, rows: Rows, user: UserMetrics, means: _Means) -> EvalPrediction:
    return predict_classes(
        model,
        rows,
        means.tokenizer,
        batch_size=means.options.batch_size,
        num_workers=means.num_workers,
        accelerator=means.accelerator,
        ignore_keys=user.ignore_keys,
        preprocess_logits=user.preprocess_logits,
        on_prediction_step=means.on_prediction_step,
    )


def _predict_tokens(model: Any, rows: Rows, user: UserMetrics, means: _Means) -> EvalPrediction:
    options = means.options
    blocks = blocks_for(model, means.tokenizer, rows, options.block_size, packing=options.packing)
    loader = batches_of(blocks, collate, batch_size=options.batch_size, accelerator=means.accelerator)
    if getattr(model, "hf_device_map", None) is None:
        model.to(means.accelerator.device)
    return predict(
        model,
        loader,
        accelerator=means.accelerator,
        ignore_keys=user.ignore_keys,
        preprocess_logits=user.preprocess_logits,
        on_prediction_step=means.on_prediction_step,
    )


def _add_metrics(record: EvaluationRecord, domain: str, found: Mapping[str, float]) -> None:
    for number, score in enumerate(record.scores):
        if (score.model, score.domain) == (MERGED, domain):
            record.scores[number] = replace(score, metrics={**score.metrics, **found})
