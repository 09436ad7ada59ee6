"""Sequence classifiers: accuracy, loss, and how far apart the classes they predict are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import EvalPrediction, PreTrainedTokenizerBase

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.measures.function_distance import PAIR_COLUMNS
from hf_frmerge.evaluation.measures.prediction_loop import LoopOptions, predict
from hf_frmerge.evaluation.measures.token_tables import TokenTable
from hf_frmerge.evaluation.text.batches import ClassificationCollator, batches_of
from hf_frmerge.evaluation.text.token_blocks import Rows
from hf_frmerge.geometry.simplex import divergence_terms


def is_classifier(architecture: str) -> bool:
    """Whether a model class is one of `AutoModelForSequenceClassification`."""
    return architecture.endswith("ForSequenceClassification")


def predict_classes(
    model: Any,
    rows: Rows,
    processing_class: PreTrainedTokenizerBase | None,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    loop: LoopOptions | None = None,
) -> EvalPrediction:
    """
    Return a classifier's predictions `(n, C)` and the labels `(n,)` of all rows, each row once.

    Args:
        model (`PreTrainedModel`):
            A sequence classifier with one label per row. It is moved to the accelerator's device unless it was
            dispatched over several.
        rows (`Dataset`, `IterableDataset` or any iterable of rows):
            Rows with `text` or `input_ids`, and a column `label` or `labels`: numbers, or names in `label2id`.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer, for text and for padding.
        batch_size, num_workers, accelerator:
            As for `batches_of`.
        loop (`LoopOptions`, *optional*):
            What is kept of every batch.

    Raises:
        ArgumentError: If the model does something else than choose one label per row, or the rows do not fit it.
    """
    accelerator = accelerator or Accelerator()
    _check(model.config)
    if model.config.pad_token_id is None and processing_class is not None:
        model.config.pad_token_id = processing_class.pad_token_id  # decoders look for the last token before it
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    loader = batches_of(
        rows,
        ClassificationCollator(processing_class, model),
        batch_size=batch_size,
        accelerator=accelerator,
        num_workers=num_workers,
    )
    return predict(model, loader, accelerator=accelerator, options=loop or LoopOptions())


def class_log_probabilities(prediction: EvalPrediction) -> NDArray[np.float64]:
    """Return the log-softmax of the first output, `(n, C)`, float64."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return `loss`, the mean negative log-likelihood in nats a sample, and `accuracy`."""
    log_probabilities, labels = class_log_probabilities(prediction), np.asarray(prediction.label_ids)
    chosen = np.take_along_axis(log_probabilities, labels[:, None], axis=-1)
    return {
        "loss": float(-chosen.mean()),
        "accuracy": float((log_probabilities.argmax(axis=-1) == labels).mean()),
    }


def compare_classes(path: Path, model: NDArray[np.float64], other: NDArray[np.float64]) -> TokenTable:
    """
    Write the divergences of two classifiers' predictions, one row a sample, for `function_distance.summarise`.

    Args:
        path (`Path`): File to write.
        model (`np.ndarray`): Log-probabilities `(n, C)` of the model that is asked about.
        other (`np.ndarray`): Those of the one it is compared with.
    """
    terms = divergence_terms(other, model)
    table = TokenTable(path, len(model), PAIR_COLUMNS).create().open(write=True)
    columns = {
        "chord_even": terms.chord,
        "chord_odd": terms.chord,
        "kl_other_model": terms.kl_pq,
        "kl_model_other": terms.kl_qp,
        "jensen_shannon": terms.jensen_shannon,
    }
    for name, values in columns.items():
        table.write(name, 0, values.sum(axis=-1))
    table.write("agrees", 0, model.argmax(axis=-1) == other.argmax(axis=-1))
    return table


def _check(config: Any) -> None:
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ArgumentError(
            f"Only classifiers that choose one label are evaluated, but this one has num_labels={config.num_labels} "
            f"and problem_type={config.problem_type!r}."
        )
