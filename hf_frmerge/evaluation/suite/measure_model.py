"""Measure everything about a model in one forward pass over the blocks of all texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_frmerge.evaluation.measures.collapse import ActivationStatistics
from hf_frmerge.evaluation.measures.function_distance import PAIR_COLUMNS, compare
from hf_frmerge.evaluation.measures.token_tables import OutputFormat, TokenTable
from hf_frmerge.evaluation.models.predictions import predictions
from hf_frmerge.evaluation.text.forward import forward_blocks, rows_of
from hf_frmerge.evaluation.text.token_blocks import TokenBlocks


@dataclass(frozen=True)
class Comparison:
    """
    A comparison of the running model with a stored one.

    Attributes:
        stored: folder with the other model's tables.
        result: folder to write the divergences of every token to.
    """

    stored: Path
    result: Path


def table_file(folder: Path, number: int) -> Path:
    """Return the table file of a text, by its number."""
    return folder / f"{number}.safetensors"


def measure_model(
    model: torch.nn.Module,
    texts: Sequence[TokenBlocks],
    *,
    output: Path | None,
    output_format: OutputFormat,
    comparisons: Sequence[Comparison],
    batch_size: int,
    accelerator: Accelerator,
    on_prediction_step: Callable[[DataLoader], None] | None = None,
) -> ActivationStatistics:
    """
    Run a model over all texts once; write predictions and divergences to tables, and accumulate activations.

    Args:
        model (`torch.nn.Module`): Causal language model or encoder-decoder of transformers, or any model with hidden
            states.
        texts (`Sequence[TokenBlocks]`): Texts to read.
        output (`Path`, *optional*): Folder for the tables of predictions, one a text; by default they are not stored.
        output_format (`OutputFormat`): Storage of the predictions of this model and of those it is compared with.
        comparisons (`Sequence[Comparison]`): Models to compare with; empty unless both predict tokens.
        batch_size (`int`): Blocks a forward pass.
        accelerator (`accelerate.Accelerator`): Every process must call this; each writes its rows of the same files.
        on_prediction_step (`Callable[[DataLoader], None]`, *optional*): Called after every batch.

    Returns:
        `ActivationStatistics`: moments of all layers, over all texts and processes.
    """
    statistics = ActivationStatistics()
    for number, blocks in enumerate(texts):
        _create_tables(blocks, number, output, output_format, comparisons, accelerator)
        with ExitStack() as stack:
            on_batch = _Recorder(blocks, number, output, output_format, comparisons, statistics, stack)
            forward_blocks(
                model,
                blocks,
                on_batch,
                batch_size=batch_size,
                accelerator=accelerator,
                on_prediction_step=on_prediction_step,
                output_hidden_states=True,
            )
        accelerator.wait_for_everyone()
    statistics.reduce(accelerator)
    return statistics


def _create_tables(
    blocks: TokenBlocks,
    number: int,
    output: Path | None,
    output_format: OutputFormat,
    comparisons: Sequence[Comparison],
    accelerator: Accelerator,
) -> None:
    """Create the tables of a text on the main process; the others wait until the files have their size."""
    if accelerator.is_main_process:
        if output is not None:
            TokenTable(table_file(output, number), blocks.n_predictions, output_format.columns).create()
        for comparison in comparisons:
            TokenTable(table_file(comparison.result, number), blocks.n_predictions, PAIR_COLUMNS).create()
    accelerator.wait_for_everyone()


class _Recorder:
    """Collect the requested measures of every batch."""

    def __init__(
        self,
        blocks: TokenBlocks,
        number: int,
        output: Path | None,
        output_format: OutputFormat,
        comparisons: Sequence[Comparison],
        statistics: ActivationStatistics,
        stack: ExitStack,
    ) -> None:
        def open_table(folder: Path, columns: Any, write: bool) -> TokenTable:
            table = TokenTable(table_file(folder, number), blocks.n_predictions, columns).open(write=write)
            stack.callback(table.close)
            return table

        self._blocks, self._format, self._statistics = blocks, output_format, statistics
        self._output = open_table(output, output_format.columns, True) if output is not None else None
        self._comparisons = [
            (open_table(c.stored, output_format.columns, False), open_table(c.result, PAIR_COLUMNS, True))
            for c in comparisons
        ]

    def __call__(self, batch: Mapping[str, torch.Tensor], output: Any) -> None:
        # Activations count every token, also the context-only first of a block. Those of an encoder-decoder are the
        # decoder's, on which all that the encoder does has its effect.
        side = "decoder_" if self._blocks.sources else ""
        self._statistics.update(getattr(output, f"{side}hidden_states"), batch[f"{side}attention_mask"])
        if self._output is None and not self._comparisons:
            return
        for index, logits, targets in rows_of(dict(batch), output.logits):
            for rows in predictions(logits, targets):  # each chunk serves all tables: the softmax is computed once
                start = self._blocks.start(index) + rows.start
                if self._output is not None:
                    self._output.write("log_prob", start, rows.log_prob)
                    self._output.write("first", start, rows.first)
                    self._format.write(self._output, start, rows)
                for stored, result in self._comparisons:
                    compare(result, start, rows, stored, self._format)
