"""Cache the results of models, keyed by the content of everything they were computed from."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.errors import CheckpointError
from hf_frmerge.evaluation.measures.function_distance import PAIR_COLUMNS
from hf_frmerge.evaluation.measures.token_tables import Columns, OutputCache, OutputFormat, TokenTable
from hf_frmerge.evaluation.models.identity import file_marks, key_of, model_identity, tokens_identity
from hf_frmerge.evaluation.record import Generation, LayerActivations
from hf_frmerge.evaluation.suite.inputs import Inputs
from hf_frmerge.evaluation.suite.measure_model import table_file

FORMAT = 2
"""Version of the cache, part of every key; raise it when the same inputs would give other numbers or files."""

_MEASURED = "measured.json"
_LIVE = "live-"  # prefix for models in memory, whose results cannot be looked up later


@dataclass(frozen=True)
class Measured:
    """What is measured of a model beside its predictions; `n_tokens` and `n_features` are of its layers."""

    causal: bool
    n_tokens: int
    n_features: int
    layers: list[LayerActivations]
    generations: list[Generation]

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Read it from a file. Raises `ValueError` if the file is not as it was written."""
        values = parse_json(path.read_bytes())
        try:
            layers = [LayerActivations(**row) for row in values["layers"]]
            generations = [Generation(**row) for row in values["generations"]]
            return cls(values["causal"], values["n_tokens"], values["n_features"], layers, generations)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error


class ResultStore:
    """
    Results of the models of one evaluation, found in the cache or still to be filled in.

    Args:
        folder (`Path`): Folder of the cache, shared with other evaluations.
        inputs (`Inputs`): Models and texts.
        output_format (`OutputFormat`): Storage of predictions.
        options (`Sequence`): Everything else the results depend on.
        accelerator (`accelerate.Accelerator`): Every process makes a store; the main one computes the keys.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Inputs,
        output_format: OutputFormat,
        options: Sequence[str | int],
        accelerator: Accelerator,
    ) -> None:
        self.format = output_format
        self._texts = list(inputs.texts.values())
        self._accelerator = accelerator
        self._sources = [*inputs.sources.values(), *([inputs.base] if inputs.base is not None else [])]
        run_and_keys = None
        if accelerator.is_main_process:
            # Before the contents are digested into keys, so that a change in between is noticed.
            self._marks = [file_marks(source) for source in self._sources]
            run_and_keys = (secrets.token_hex(4), _keys(inputs, [FORMAT, output_format.top_k, *options]))
        run, self._keys = self.agree(run_and_keys)
        self._cache = OutputCache(folder, run)

    def agree(self, value: Any) -> Any:
        """Return the main process's value on every process."""
        shared = [value]
        broadcast_object_list(shared)
        return shared[0]

    def key(self, model: str, other: str | None = None) -> str:
        """Return the key of a model's results, or of its comparison with another model."""
        return self._keys[model] if other is None else f"{self._keys[model]}-{self._keys[other]}"

    def missing(self, model: str, others: Sequence[str]) -> list[str]:
        """Return the keys not in the cache for a model and its comparisons with others; remove damaged entries."""
        needed = {self.key(model): self.format.columns} | {self.key(model, other): PAIR_COLUMNS for other in others}
        missing = None
        if self._accelerator.is_main_process:
            missing = [key for key, columns in needed.items() if not self._is_complete(key, columns)]
        return self.agree(missing)

    def path(self, key: str) -> Path:
        """Return the folder of complete results."""
        return self._cache.path(key)

    def unfinished(self, key: str) -> Path:
        """Return the folder to fill for a key."""
        return self._cache.unfinished(key)

    def begin(self, keys: Sequence[str]) -> None:
        """Create the folders to fill; every process must call it."""
        if self._accelerator.is_main_process:
            for key in keys:
                self._cache.begin(key)
        self._accelerator.wait_for_everyone()

    def write_measured(self, key: str, measured: Measured) -> None:
        """Write the results that are not tables; call it on one process."""
        write_file(self.unfinished(key) / _MEASURED, json.dumps(asdict(measured)))

    def publish(self, keys: Sequence[str]) -> None:
        """
        Move the filled folders into the cache; every process must call it.

        Raises:
            CheckpointError: If a file of a model changed since its key was computed: key and results may not match.
        """
        self._accelerator.wait_for_everyone()
        changed = self.agree(self._changed() if self._accelerator.is_main_process else None)
        if changed:
            raise CheckpointError(
                f"{changed} changed while it was evaluated: what was measured last is not kept. Evaluate it again."
            )
        if self._accelerator.is_main_process:
            for key in keys:
                self._cache.publish(key)
        self._accelerator.wait_for_everyone()

    def measured(self, model: str) -> Measured:
        """
        Read what `write_measured` wrote.

        Raises:
            CheckpointError: If the file was damaged since `missing` looked at it.
        """
        path = self.path(self.key(model)) / _MEASURED
        try:
            return Measured.read(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}, which an evaluation keeps, cannot be read: {error}. Evaluate again: it is measured anew."
            ) from error

    def _changed(self) -> str | None:
        """Return the model and name of a file that changed, or `None`; call it on the main process."""
        for source, before in zip(self._sources, self._marks):
            now = file_marks(source)
            for name in sorted(before.keys() | now.keys()):
                if before.get(name) != now.get(name):
                    return f"{source.spec!r}: {name}"
        return None

    @contextmanager
    def tables(
        self, number: int, models: Sequence[str]
    ) -> Iterator[tuple[dict[str, TokenTable], dict[tuple[str, str], TokenTable]]]:
        """Open the tables of a text: by model, and by pair of models with the later one first."""
        with ExitStack() as stack:

            def open_table(key: str, columns: Columns) -> TokenTable:
                table = self._table(key, number, columns).open()
                stack.callback(table.close)
                return table

            yield (
                {name: open_table(self.key(name), self.format.columns) for name in models},
                {
                    (one, two): open_table(self.key(one, two), PAIR_COLUMNS)
                    for place, one in enumerate(models)
                    for two in models[:place]
                },
            )

    def clean_up(self) -> None:
        """Remove unfinished folders, and the results of models in memory."""
        if self._accelerator.is_main_process:
            self._cache.clear()
            for key in self._keys.values():
                if key.startswith(_LIVE):
                    self._cache.discard_all_of(key)

    def _table(self, key: str, number: int, columns: Columns) -> TokenTable:
        """Return a table of a text, not yet open."""
        return TokenTable(table_file(self.path(key), number), self._texts[number].n_predictions, columns)

    def _is_complete(self, key: str, columns: Columns) -> bool:
        """Check what is kept under a key; remove the key if any of it is damaged."""
        try:
            if self._cache.has(key) and key in self._keys.values():  # a comparison of two models has tables only
                Measured.read(self.path(key) / _MEASURED)
        except (OSError, ValueError):
            self._cache.discard_all_of(key)
        for number in range(len(self._texts)):
            table = self._table(key, number, columns)
            try:
                if table.path.exists():  # models that do not predict the next token have no tables
                    table.open().close()
            except ValueError:
                self._cache.discard_all_of(key)
        return self._cache.has(key)


def _keys(inputs: Inputs, options: Sequence[str | int]) -> dict[str, str]:
    """Return the key of every model: a digest of weights, texts, options and library versions, or a random one."""
    base = model_identity(inputs.base) if inputs.base is not None else None
    shared = {
        # New versions may compute other numbers from the same weights.
        "versions": [torch.__version__, transformers.__version__],
        "options": list(options),
        "texts": [
            [
                tokens_identity(numbers)
                for numbers in (text.tokens, text.labels, torch.tensor(text.bounds), *text.sources)
            ]
            for text in inputs.texts.values()
        ],
    }
    keys = {name: f"{_LIVE}{secrets.token_hex(8)}" for name in inputs.live}
    for name, source in inputs.sources.items():
        keys[name] = key_of(shared | {"model": [model_identity(source), base if source.kind == "adapter" else None]})
    return keys
