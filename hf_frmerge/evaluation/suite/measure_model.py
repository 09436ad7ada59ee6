"""One forward pass over every block of every text, from which everything about a model is measured."""

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
    A comparison to make while a model runs.

    Attributes:
        stored: folder of the other model's tables.
        result: folder for the divergences of every token.
    """

    stored: Path
    result: Path


def table_file(folder: Path, number: int) -> Path:
    """Return the file of the text of this number."""
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
    Run a model over all texts once: its predictions and their divergences go to tables, its activations are counted.

    Args:
        model (`torch.nn.Module`): Causal language model of transformers, or any model with hidden states.
        texts (`Sequence[TokenBlocks]`): What it reads.
        output (`Path`, *optional*): Folder for the tables of its predictions, one a text; `None` for none.
        output_format (`OutputFormat`): How predictions are stored, its own and those it is compared with.
        comparisons (`Sequence[Comparison]`): With whom; made only of models that predict the next token.
        batch_size (`int`): Blocks a forward pass.
        accelerator (`accelerate.Accelerator`): All processes call this; each fills its rows of the same files.
        on_prediction_step (`Callable[[DataLoader], None]`, *optional*): Called after every batch.

    Returns:
        `ActivationStatistics`: of all layers, over all texts and processes.
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
    if accelerator.is_main_process:
        if output is not None:
            TokenTable(table_file(output, number), blocks.n_predictions, output_format.columns).create()
        for comparison in comparisons:
            TokenTable(table_file(comparison.result, number), blocks.n_predictions, PAIR_COLUMNS).create()
    accelerator.wait_for_everyone()


class _Recorder:
    """Collects the requested measures of every batch."""

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
        def opened(folder: Path, columns: Any, write: bool) -> TokenTable:
            table = TokenTable(table_file(folder, number), blocks.n_predictions, columns).open(write=write)
            stack.callback(table.close)
            return table

        self._blocks, self._format, self._statistics = blocks, output_format, statistics
        self._output = opened(output, output_format.columns, True) if output is not None else None
        self._comparisons = [
            (opened(c.stored, output_format.columns, False), opened(c.result, PAIR_COLUMNS, True)) for c in comparisons
        ]

    def __call__(self, batch: Mapping[str, torch.Tensor], output: Any) -> None:
        self._statistics.update(output.hidden_states, batch["attention_mask"])
        if self._output is None and not self._comparisons:
            return
        for index, logits, targets in rows_of(dict(batch), output.logits):
            for rows in predictions(logits, targets):
                start = self._blocks.start(index) + rows.start
                if self._output is not None:
                    self._output.write("log_prob", start, rows.log_prob)
                    self._output.write("first", start, rows.first)
                    self._format.write(self._output, start, rows)
                for stored, result in self._comparisons:
                    compare(result, start, rows, stored, self._format)
