"""Evaluate a merge: the merged model, its base and its experts, on the datasets of a user."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedTokenizerBase
from transformers.trainer_utils import denumpify_detensorize, speed_metrics

from hf_frmerge.checkpoints.resolve import Source, resolve
from hf_frmerge.checkpoints.source import refuse_gguf
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.measures.classification import is_classifier, is_image_classifier, predict_classes
from hf_frmerge.evaluation.measures.prediction_loop import LoopOptions, Preprocess, predict
from hf_frmerge.evaluation.models.merged import architecture_of, image_processor_of, tokenizer_of, whole_model
from hf_frmerge.evaluation.models.names import models_of_merge
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.evaluation.suite.classifier_suite import evaluate_classifiers
from hf_frmerge.evaluation.suite.embedding_suite import embedding_scores, steps_of_models
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.suite.suite import evaluate_suite
from hf_frmerge.evaluation.text.batches import batches_of
from hf_frmerge.evaluation.text.forward import blocks_for
from hf_frmerge.evaluation.text.token_blocks import Rows, collate
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.record.find_models import MergeModels


@dataclass(frozen=True)
class UserMetrics:
    """
    Metrics a user computes from the predictions of the merged model, as with `transformers.Trainer`.

    Predictions of a language model are the logits `(n, T, V)` of all blocks (or rows), and labels are their tokens,
    each predicted by the position before it. Use `preprocess_logits` to keep less than the logits.

    Attributes:
        model: returns the merged model, which is run on the datasets once more.
        compute: called with an `EvalPrediction`, returns metrics by name; `None` for no user metrics.
        preprocess_logits: called with predictions and labels of each batch; its result is kept in their place.
        ignore_keys: outputs of the model that are not predictions.
    """

    model: Callable[[], Any]
    compute: Callable[[EvalPrediction], dict[str, float]] | None
    preprocess_logits: Preprocess | None = None
    ignore_keys: list[str] | None = None


def models_to_measure(
    models: MergeModels,
    merged: str | torch.nn.Module | None,
    processing_class: Any = None,
    token: str | None = None,
    allow_pickle: bool = False,
) -> ModelSet:
    """
    Name the models of a merge, with their roles and weights.

    Args:
        models (`MergeModels`): Base, experts and weights.
        merged (`str` or `torch.nn.Module`, *optional*): Merged model, its folder or its Hub id.
        processing_class (`PreTrainedTokenizerBase` or `BaseImageProcessor`, *optional*): Tokenizer or image processor.
        token (`str`, *optional*): Token for the Hub.
        allow_pickle (`bool`, *optional*, defaults to `False`): Whether weights may be pickles.
    """
    specs, roles = models_of_merge(models.experts, models.base_model, merged)
    names = [name for name, role in roles.items() if role == "expert"]
    # What was subtracted should not be kept; if nothing else went in, all count alike.
    kept = [max(weight, 0.0) for weight in models.weights or ()]
    weights = dict(zip(names, kept)) if any(kept) and names else None
    return ModelSet(specs, roles, weights, models.base_model, processing_class, token, allow_pickle)


def evaluate_merge(
    models: ModelSet,
    domains: Mapping[str, Rows],
    options: SuiteOptions | None = None,
    run: RunSettings | None = None,
    user_metrics: UserMetrics | None = None,
) -> EvaluationRecord:
    """
    Evaluate classifiers of text or images with `evaluate_classifiers`, and other models with `evaluate_suite`.

    Of models that make embeddings (sentence-transformers) these are compared, too, with `embedding_scores`.

    By default the base of adapters is the one in their configuration, and the tokenizer (or image processor) is that
    of the merged model, or else of the first model that has one.

    Args:
        models (`ModelSet`):
            Models, with their roles.
        domains (`Mapping[str, Rows]`):
            Name -> `Dataset`, `IterableDataset` or any rows.
        options, run:
            As for `evaluate_suite`.
        user_metrics (`UserMetrics`, *optional*):
            Metrics to add to the scores of the merged model.

    Raises:
        ArgumentError: If a dataset does not fit the models.
    """
    options, run = options or SuiteOptions(), run or RunSettings()
    sources = {
        name: resolve(spec, token=models.token, allow_pickle=models.allow_pickle)
        for name, spec in models.specs.items()
        if isinstance(spec, str)
    }
    refuse_gguf(sources.values())
    models = _with_base(models, sources)
    architecture = _architecture(models, sources)
    classifies = is_classifier(architecture) or is_image_classifier(architecture)
    models = _with_processing_class(models, sources, of_images=is_image_classifier(architecture))
    if classifies:
        record = evaluate_classifiers(models, domains, options, run)
    else:
        domains = {name: list(rows) if isinstance(rows, Iterator) else rows for name, rows in domains.items()}
        record = evaluate_suite(models, domains, options, run)
        steps = steps_of_models(sources)
        if steps is not None and not record.scores:
            base = _resolved_base(models)
            record.scores = embedding_scores(models, sources, base, domains, steps, options, run)
    if user_metrics is not None and user_metrics.compute is not None and MERGED in models.specs:
        model = user_metrics.model()
        predict_rows = _predict_classes if classifies else _predict_tokens
        loop = LoopOptions(
            ignore_keys=user_metrics.ignore_keys,
            preprocess_logits=user_metrics.preprocess_logits,
            on_prediction_step=run.on_prediction_step,
        )
        for domain, rows in domains.items():
            prediction = predict_rows(model, rows, models.processing_class, options, run, loop)
            _add_metrics(record, domain, denumpify_detensorize(user_metrics.compute(prediction)))
    return record


def measure_merge(
    args: MergingArguments,
    models: MergeModels,
    merged: str | torch.nn.Module | None,
    domains: Mapping[str, Rows],
    processing_class: Any,
    user_metrics: UserMetrics,
    on_prediction_step: Callable[[DataLoader], object],
) -> tuple[EvaluationRecord, dict[str, float]]:
    """
    Evaluate the models of a merge with the settings in its arguments, and time it.

    Args:
        args (`MergingArguments`):
            Arguments of the merge.
        models (`MergeModels`):
            Base and experts; measured beside a merged model only with `args.evaluate_experts`.
        merged (`str` or `torch.nn.Module`, *optional*):
            Folder of the merged model, or the model; without it only base and experts are measured.
        domains, user_metrics:
            As for `evaluate_merge`.
        processing_class (`PreTrainedTokenizerBase` or `BaseImageProcessor`, *optional*):
            Tokenizer or image processor; by default that of the merged model.
        on_prediction_step (`Callable[[DataLoader], object]`):
            Called after every batch.

    Returns:
        The record, and `runtime` in seconds, `samples_per_second` and `steps_per_second` as in `Trainer`. A sample is
        a row or block read by a model; models found in the cache do not count.
    """
    if merged is not None and processing_class is None:
        folder = whole_model(args.output_dir, models.base_model, args.hub_token, args.allow_pickle)
        of_images = is_image_classifier(architecture_of(folder))
        processing_class = image_processor_of(folder) if of_images else tokenizer_of(folder)
    if isinstance(merged, torch.nn.Module) and args.eval_dtype != "auto":
        # A model in memory is measured in the dtype that one on disk would be loaded in.
        merged.to(getattr(torch, args.eval_dtype))
    model_set = models_to_measure(models, merged, processing_class, args.hub_token, args.allow_pickle)
    if merged is not None and not args.evaluate_experts:
        model_set = replace(model_set, specs={MERGED: merged}, roles={MERGED: "merged"}, weights=None)
    started, names, n_steps = time.time(), list[str](), 0

    def count(loader: DataLoader) -> None:
        nonlocal n_steps
        n_steps += 1
        on_prediction_step(loader)

    options = SuiteOptions(
        batch_size=args.per_device_eval_batch_size,
        block_size=args.eval_block_size,
        packing=args.eval_packing,
        dtype=args.eval_dtype,
        device_map=args.device_map,
    )
    run = RunSettings(
        accelerator=Accelerator(cpu=args.use_cpu),
        num_workers=args.dataloader_num_workers,
        on_model=names.append,
        on_prediction_step=count,
    )
    record = evaluate_merge(model_set, domains, options, run, user_metrics)
    block = record.settings.get("block_size", 2)
    # Rows joined into one stream are counted as blocks, each of which scores `block - 1` tokens.
    samples = {score.domain: score.n_samples or -(-score.n_tokens // (block - 1)) for score in record.scores}
    speed = speed_metrics("", started, num_samples=len(names) * sum(samples.values()), num_steps=n_steps)
    return record, {name.removeprefix("_"): value for name, value in speed.items()}


def _with_base(models: ModelSet, sources: Mapping[str, Source]) -> ModelSet:
    """Fill in the base from the adapters' configuration, unless the caller set it."""
    if models.base_model is not None:
        return models
    adapters = [source for source in sources.values() if source.kind == "adapter"]
    base = next((whole_model(adapter.path, None, models.token, models.allow_pickle) for adapter in adapters), None)
    return replace(models, base_model=base)


def _resolved_base(models: ModelSet) -> Source | None:
    """Return the base of adapters."""
    base = models.base_model
    return None if base is None else resolve(str(base), token=models.token, allow_pickle=models.allow_pickle)


def _with_processing_class(models: ModelSet, sources: Mapping[str, Source], *, of_images: bool) -> ModelSet:
    """Fill in the tokenizer or image processor, unless the caller set it."""
    if models.processing_class is not None:
        return models
    # The merged model first: what it has is what it is used with.
    names = [name for name in dict.fromkeys((_main_model(models), *sources)) if name in sources]
    folders = {name: _whole_folder(models, sources[name]) for name in names}
    if not of_images:
        return replace(models, processing_class=next(filter(None, map(tokenizer_of, folders.values())), None))
    return replace(models, processing_class=common_image_processor(folders))


def common_image_processor(folders: Mapping[str, str]) -> BaseImageProcessor | None:
    """
    Return the image processor of models, by their names and folders; `None` if there is none beside any of them.

    Raises:
        ArgumentError: If they prepare images differently.
    """
    found = {name: image_processor_of(folder) for name, folder in folders.items()}
    processors = {name: processor for name, processor in found.items() if processor is not None}
    _refuse_other_processors(processors)
    return next(iter(processors.values()), None)


def _refuse_other_processors(processors: Mapping[str, BaseImageProcessor]) -> None:
    """Raise if models prepare images differently: they would be compared on different ones."""
    settings = {name: processor.to_dict() for name, processor in processors.items()}
    for name, other in settings.items():
        first_name, first = next(iter(settings.items()))
        differing = [key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]
        if differing:
            raise ArgumentError(
                f"Outputs can only be compared on the same images, but {name!r} prepares them differently than "
                f"{first_name!r}: {some(differing)} in preprocessor_config.json. Evaluate each by itself, or pass one "
                "processor for all as `processing_class`."
            )


def _architecture(models: ModelSet, sources: Mapping[str, Source]) -> str:
    """Return the class name of the merged model, or of the first model without one."""
    name = _main_model(models)
    if name in sources:
        return architecture_of(_whole_folder(models, sources[name]))
    return type(models.specs.get(name)).__name__


def _main_model(models: ModelSet) -> str:
    """Return the name of the merged model, or of the first model without one."""
    return MERGED if MERGED in models.specs else next(iter(models.specs), "")


def _whole_folder(models: ModelSet, source: Source) -> str:
    """Return the folder of a checkpoint, for an adapter that of its base."""
    base_model = None if models.base_model is None else str(models.base_model)
    return whole_model(source.path, base_model, models.token, models.allow_pickle)


def _predict_classes(
    model: Any,
    rows: Rows,
    processing_class: Any,
    options: SuiteOptions,
    run: RunSettings,
    loop: LoopOptions,
) -> EvalPrediction:
    """Run a classifier over a dataset."""
    return predict_classes(
        model,
        rows,
        processing_class,
        batch_size=options.batch_size,
        num_workers=run.num_workers,
        accelerator=run.accelerator,
        loop=loop,
    )


def _predict_tokens(
    model: Any,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase | None,
    options: SuiteOptions,
    run: RunSettings,
    loop: LoopOptions,
) -> EvalPrediction:
    """Run a language model over the blocks of a text, with the same signature as `_predict_classes`."""
    blocks = blocks_for(model, tokenizer, rows, options.block_size, packing=options.packing)
    loader = batches_of(blocks, collate, batch_size=options.batch_size, accelerator=run.accelerator)
    if getattr(model, "hf_device_map", None) is None:
        model.to(run.accelerator.device)
    return predict(model, loader, accelerator=run.accelerator, options=loop)


def _add_metrics(record: EvaluationRecord, domain: str, metrics: Mapping[str, float]) -> None:
    """Add user metrics to the score of the merged model on a dataset."""
    for number, score in enumerate(record.scores):
        if (score.model, score.domain) == (MERGED, domain):
            record.scores[number] = replace(score, metrics={**score.metrics, **metrics})
