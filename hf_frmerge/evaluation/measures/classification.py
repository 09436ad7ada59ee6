"""Measure classifiers of text and images: accuracy, loss, and divergences of their predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import EvalPrediction

from hf_frmerge.checkpoints.alignment.class_order import class_names, row_order
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.measures.function_distance import PAIR_COLUMNS
from hf_frmerge.evaluation.measures.prediction_loop import LoopOptions, predict
from hf_frmerge.evaluation.measures.token_tables import TokenTable
from hf_frmerge.evaluation.text.batches import ClassificationCollator, batches_of
from hf_frmerge.evaluation.text.token_blocks import Rows
from hf_frmerge.geometry.simplex import divergence_terms


def is_classifier(architecture: str) -> bool:
    """Return whether a model class, given by name, is a sequence classifier."""
    return architecture.endswith("ForSequenceClassification")


def is_image_classifier(architecture: str) -> bool:
    """Return whether a model class, given by name, is a classifier of images."""
    return architecture.endswith("ForImageClassification")


def predict_classes(
    model: Any,
    rows: Rows,
    processing_class: Any,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    loop: LoopOptions | None = None,
    classes: Sequence[str] | None = None,
) -> EvalPrediction:
    """
    Run a classifier over a dataset; return its predictions `(n, C)` and the labels `(n,)`, each row once.

    Args:
        model (`PreTrainedModel`):
            A classifier of text or images with one label per row. It is moved to the accelerator's device unless it
            was dispatched over several.
        rows (`Dataset`, `IterableDataset` or any iterable of rows):
            Rows with `text` or `input_ids`, for a classifier of images `image` or `pixel_values`, and a column
            `label` or `labels`: numbers, or names in `label2id`.
        processing_class (`PreTrainedTokenizerBase` or `BaseImageProcessor`, *optional*):
            Tokenizer, needed for text and for padding, or image processor.
        batch_size, num_workers, accelerator:
            As for `batches_of`.
        loop (`LoopOptions`, *optional*):
            What to keep of every batch.
        classes (`Sequence[str]`, *optional*):
            Names of the classes in the order of the columns to return, which is that of numbers in the rows, too; by
            default the model's own order.

    Raises:
        ArgumentError: If the model has other classes, does not choose one label per row, or a row does not fit it.
    """
    accelerator = accelerator or Accelerator()
    _require_single_label(model.config)
    columns = _columns(model.config, classes)
    padding = getattr(processing_class, "pad_token_id", None)  # image processors have none
    if padding is not None and model.config.pad_token_id is None:
        # A decoder classifies the last token before the padding, so it has to know the padding.
        model.config.pad_token_id = padding
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    loader = batches_of(
        rows,
        ClassificationCollator(processing_class, model, None if columns is None else classes),
        batch_size=batch_size,
        accelerator=accelerator,
        num_workers=num_workers,
    )
    prediction = predict(model, loader, accelerator=accelerator, options=loop or LoopOptions())
    if columns is None:
        return prediction
    outputs = prediction.predictions
    if isinstance(outputs, tuple):  # the logits come first when a model has several outputs
        return EvalPrediction((outputs[0][:, columns], *outputs[1:]), prediction.label_ids)
    return EvalPrediction(outputs[:, columns], prediction.label_ids)


def classes_of(model: Any) -> list[str] | None:
    """Return the names of a classifier's classes in the order of its outputs; None if its config names none."""
    return class_names(model.config.to_dict())


def class_log_probabilities(prediction: EvalPrediction) -> NDArray[np.float64]:
    """Return the log-softmax of the logits, `(n, C)`, float64."""
    # The logits come first when a model has several outputs.
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def label_log_probabilities(prediction: EvalPrediction) -> NDArray[np.float64]:
    """Return the log-probability of every row's label, `(n,)`, float64."""
    labels = np.asarray(prediction.label_ids)
    return np.take_along_axis(class_log_probabilities(prediction), labels[:, None], axis=-1)[:, 0]


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return `loss`, the mean negative log-likelihood in nats a sample, and `accuracy`."""
    chosen = class_log_probabilities(prediction).argmax(axis=-1)
    return {
        "loss": float(-label_log_probabilities(prediction).mean()),
        "accuracy": float((chosen == np.asarray(prediction.label_ids)).mean()),
    }


def compare_classes(path: Path, model: NDArray[np.float64], other: NDArray[np.float64]) -> TokenTable:
    """
    Compute the divergences of two classifiers, one row a sample, into a table for `function_distance.summarise`.

    Args:
        path (`Path`): File to write.
        model (`np.ndarray`): Log-probabilities of the model in question, `(n, C)`, float64.
        other (`np.ndarray`): Log-probabilities of the model it is compared with.

    Returns:
        `TokenTable`: open; the caller closes it.
    """
    terms = divergence_terms(other, model)
    table = TokenTable(path, len(model), PAIR_COLUMNS).create().open(write=True)
    columns = {
        # All classes are compared, so both halves are exact and their stated error is 0.
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


def _columns(config: Any, classes: Sequence[str] | None) -> list[int] | None:
    """Return the model's column of every class; None if it has them in this order, or nothing names them."""
    of_model = class_names(config.to_dict())
    if classes is None or of_model is None:
        return None
    order = row_order(classes, of_model)
    if order is None:
        raise ArgumentError(
            f"These classifiers have different classes: {some(classes)} and {some(of_model)}, so their predictions "
            "cannot be compared. If they mean the same, write the same id2label and label2id into their config.json "
            "files."
        )
    return None if order == tuple(range(len(of_model))) else list(order)


def _require_single_label(config: Any) -> None:
    """Refuse regression and multi-label models, whose outputs are not a distribution over classes."""
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ArgumentError(
            f"Only classifiers that choose one label are evaluated, but this one has num_labels={config.num_labels} "
            f"and problem_type={config.problem_type!r}."
        )
