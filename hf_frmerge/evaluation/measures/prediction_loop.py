"""Run a model over a dataset and gather its predictions from all processes, as `Trainer` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer, nested_detach, nested_truncate

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.measures.collapse import ActivationStatistics
from hf_frmerge.evaluation.text.batches import INDEX
from hf_frmerge.evaluation.text.token_blocks import IGNORED_LABEL

Preprocess = Callable[[Any, torch.Tensor], Any]

_HIDDEN_STATES = ("hidden_states", "reshaped_hidden_states")  # outputs that hold them; Swin gives both


@dataclass(frozen=True)
class LoopOptions:
    """
    Which outputs of a batch to keep, and callbacks.

    Attributes:
        ignore_keys: outputs of the model to leave out; by default its configuration's `keys_to_ignore_at_inference`,
            else `past_key_values`.
        preprocess_logits: called with predictions and labels of each batch; its result is gathered in place of the
            predictions. Logits of a language model, `(B, T, V)`, rarely fit in memory for a whole dataset; their
            argmax does.
        activations: accumulates the hidden states of this process's rows.
        on_prediction_step: called after every batch.
    """

    ignore_keys: list[str] | None = None
    preprocess_logits: Preprocess | None = None
    activations: ActivationStatistics | None = None
    on_prediction_step: Callable[[DataLoader], None] | None = None


def predict(
    model: torch.nn.Module, loader: DataLoader, *, accelerator: Accelerator, options: LoopOptions
) -> EvalPrediction:
    """
    Run a model over a dataset and return its predictions in the order of the rows, each row once.

    As in `transformers.Trainer`, predictions are the outputs of the model without the loss and `ignore_keys`, a tuple
    if there are several, and batches are padded to one length with -100. Every process gets all predictions.

    Args:
        model (`torch.nn.Module`):
            Model, on its device.
        loader (`DataLoader`):
            Dataloader from `batches_of`, whose batches have the entries `labels` and `index`.
        accelerator (`accelerate.Accelerator`):
            Gathers from the processes.
        options (`LoopOptions`):
            Outputs to keep, and callbacks.

    Returns:
        `EvalPrediction`: arrays with one entry a row on the first axis.

    Raises:
        ArgumentError: If there are no rows.
    """
    ignore_keys, activations = options.ignore_keys, options.activations
    if ignore_keys is None:
        ignore_keys = getattr(model.config, "keys_to_ignore_at_inference", None) or ["past_key_values"]
    predictions, labels = (
        EvalLoopContainer(padding_index=IGNORED_LABEL),
        EvalLoopContainer(padding_index=IGNORED_LABEL),
    )
    # The model is run without labels: the loss is not needed, and would take as much memory as the logits.
    extra = {"output_hidden_states": True} if activations is not None else {}
    left_out = {*ignore_keys, "loss", *(_HIDDEN_STATES if activations is not None else ())}
    n_rows = 0
    was_training = model.training
    model.eval()
    for batch in loader:
        if batch is None:  # accelerate before 1.10 yields this for an empty dataset
            break
        index = batch.pop(INDEX)
        # Gathered rows are in order: those of process 0, then of process 1, ... Repeats come last, out of sequence.
        gathered = accelerator.gather(index).cpu()
        n_new = int((gathered == torch.arange(n_rows, n_rows + len(gathered))).cumprod(0).sum())
        n_mine = min(max(n_new - accelerator.process_index * len(index), 0), len(index))
        n_rows += n_new
        batch_labels = accelerator.pad_across_processes(batch.pop("labels"), dim=1, pad_index=IGNORED_LABEL)
        with torch.inference_mode():
            outputs = model(**batch, **extra)
        if activations is not None and n_mine and outputs.get("hidden_states"):
            mask = batch.get("attention_mask")  # images have none
            states = [layer[:n_mine] for layer in outputs.hidden_states]
            activations.update(states, mask if mask is None else mask[:n_mine])
        kept = nested_detach(tuple(value for name, value in outputs.items() if name not in left_out))
        logits = accelerator.pad_across_processes(kept[0] if len(kept) == 1 else kept, dim=1, pad_index=IGNORED_LABEL)
        if options.preprocess_logits is not None:
            logits = options.preprocess_logits(logits, batch_labels)
        logits, batch_labels = accelerator.gather((logits, batch_labels))
        for container, values in ((predictions, logits), (labels, batch_labels)):
            container.add(nested_truncate(values, n_new))
            container.to_cpu_and_numpy()  # after every batch, to leave the device's memory to the model
        if options.on_prediction_step is not None:
            options.on_prediction_step(loader)
    model.train(was_training)
    if not n_rows:
        raise ArgumentError("The evaluation data has no rows. Check that the file or the dataset split is not empty.")
    return EvalPrediction(predictions=predictions.get_arrays(), label_ids=labels.get_arrays())
