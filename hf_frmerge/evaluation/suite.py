"""Everything that is measured of a merge, in one call."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from hf_frmerge.checkpoints.resolve import Source, resolve
from hf_frmerge.checkpoints.writer import write_file
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.blocks import Rows, cut, separate_rows, token_stream
from hf_frmerge.evaluation.function_distance import PAIR_COLUMNS, objective, summarise
from hf_frmerge.evaluation.generation import continue_greedily, repetition
from hf_frmerge.evaluation.identity import key_of, model_identity, tokens_identity
from hf_frmerge.evaluation.loading import ModelLoader, predicts_next_token
from hf_frmerge.evaluation.loop import metrics_of
from hf_frmerge.evaluation.measure import Comparison, measure_model, table_file
from hf_frmerge.evaluation.outputs import Columns, OutputCache, OutputFormat, TokenTable
from hf_frmerge.evaluation.record import (
    MERGED,
    EvaluationRecord,
    Generation,
    LayerActivations,
    Role,
    Score,
)
from hf_frmerge.evaluation.results import recovery_rows, worst_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of what is kept in the cache; raised whenever the same inputs would give other figures or other files."""

_MEASURED = "measured.json"


@dataclass(frozen=True)
class SuiteOptions:
    """
    How to measure.

    Attributes:
        batch_size: blocks a forward pass, on each process.
        block_size: tokens a block: each is predicted from at most `block_size - 1` tokens before it.
        dtype: to load models in; `"auto"` is the one a model is stored in.
        top_k: likeliest tokens kept of every prediction, beside as many drawn from the rest; 0 keeps whole
            distributions, `4 * V` bytes a token, model and text, and makes the distances exact.
        n_worst: tokens to show per expert and domain.
        n_prompts: generations per model and domain.
        max_new_tokens: tokens a generation.
        device_map: as in `from_pretrained`, for models larger than one device.
        packing: join the rows of a text into one stream that is cut into blocks; if not, each is read by itself.
    """

    batch_size: int = 8
    block_size: int = 256
    dtype: str | torch.dtype = "auto"
    top_k: int = 128
    n_worst: int = 10
    n_prompts: int = 1
    max_new_tokens: int = 32
    device_map: str | dict[str, Any] | None = None
    packing: bool = True


def evaluate_suite(
    models: Mapping[str, str | Path | torch.nn.Module],
    domains: Mapping[str, Rows],
    *,
    roles: Mapping[str, Role],
    weights: Mapping[str, float] | None = None,
    base_model: str | Path | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    options: SuiteOptions | None = None,
    cache_dir: Path | str | None = None,
    accelerator: Accelerator | None = None,
    token: str | None = None,
    on_model: Callable[[str], object] | None = None,
    on_prediction_step: Callable[[DataLoader], None] | None = None,
) -> EvaluationRecord:
    """
    Measure models on texts: scores, function distances, activations, generations.

    Every model reads every text once, and everything is measured in that one pass. Models are loaded one at a time,
    the merged one last. What is found is kept in `cache_dir` by the content of weights, texts and options: a model
    that was measured before is not even loaded.

    Args:
        models (`Mapping[str, str | Path | torch.nn.Module]`):
            Name -> folder, Hub id, or a model in memory. The merged one is named `"merged"`. Results of models in
            memory are not kept.
        domains (`Mapping[str, Iterable]`):
            Name of a text -> rows of text or tokens, as `evaluate_causal_lm` takes them.
        roles (`Mapping[str, str]`):
            Name of every model -> `"base"`, `"expert"` or `"merged"`.
        weights (`Mapping[str, float]`, *optional*):
            Weight of every expert in the objective; equal by default. Scaled to sum to 1.
        base_model (`str` or `Path`, *optional*):
            What adapters are put on. Defaults to the model whose role is `"base"`.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer. Defaults to that of the base, else of the first whole checkpoint.
        options (`SuiteOptions`, *optional*):
            How to measure.
        cache_dir (`Path` or `str`, *optional*):
            Defaults to `$HF_FRMERGE_CACHE/evaluation`, else `~/.cache/hf_frmerge/evaluation`. On several processes all
            must see the same folder.
        accelerator (`accelerate.Accelerator`, *optional*):
            Defaults to a new one. Every process of a distributed run must call this function; all get the result.
        token (`str`, *optional*):
            Token for the Hub.
        on_model (`Callable[[str], object]`, *optional*):
            Called with the name of every model that is about to be run, that is, not found in the cache.
        on_prediction_step (`Callable[[DataLoader], None]`, *optional*):
            Called after every batch.

    Returns:
        `EvaluationRecord`: without what could not be measured of these models.

    Raises:
        ArgumentError: If there is no model or no text, a role is missing, an adapter has no base, the models have
            vocabularies of different sizes, or a text cannot be used.
        CheckpointError: If a model is missing or broken.
    """
    suite = _Suite(
        models=models,
        roles=roles,
        options=options or SuiteOptions(),
        accelerator=accelerator or Accelerator(),
        token=token,
        base_model=base_model,
    )
    suite.read_texts(domains, processing_class)
    suite.open_cache(Path(cache_dir) if cache_dir is not None else default_cache_dir())
    try:
        suite.measure_all(on_model, on_prediction_step)
        record = suite.record(weights)
        suite.accelerator.wait_for_everyone()  # all have read what is removed next
    finally:
        suite.clean_up()
    return record


def default_cache_dir() -> Path:
    """Return where results are kept unless the caller says otherwise."""
    configured = os.environ.get("HF_FRMERGE_CACHE")
    root = Path(configured).expanduser() if configured else Path.home() / ".cache" / "hf_frmerge"
    return root / "evaluation"


class _Suite:
    """State of one call of `evaluate_suite`; its methods are the stages, in order."""

    def __init__(
        self,
        models: Mapping[str, str | Path | torch.nn.Module],
        roles: Mapping[str, Role],
        options: SuiteOptions,
        accelerator: Accelerator,
        token: str | None,
        base_model: str | Path | None,
    ) -> None:
        if not models:
            raise ArgumentError("Expected at least one model.")
        for name in models:
            if name not in roles:
                raise ArgumentError(f"The model {name!r} has no role: say whether it is base, expert or merged.")
        rank = {"base": 0, "expert": 1, "merged": 2}
        self.roles = {name: roles[name] for name in sorted(models, key=lambda name: rank[roles[name]])}
        self.models = {name: models[name] for name in self.roles}
        self.options, self.accelerator = options, accelerator
        # All are looked up before the first is loaded, so that a wrong name fails at once.
        self.sources = {
            name: resolve(str(spec), token=token)
            for name, spec in self.models.items()
            if not isinstance(spec, torch.nn.Module)
        }
        self.base = self._find_base(base_model, token)
        for source in self.sources.values():
            if source.kind == "adapter" and self.base is None:
                raise ArgumentError(
                    f"{source.spec!r} is an adapter: pass the model it was trained from as base_model."
                )

    def _find_base(self, base_model: str | Path | None, token: str | None) -> Source | None:
        if base_model is not None:
            return resolve(str(base_model), token=token)
        return next((source for name, source in self.sources.items() if self.roles[name] == "base"), None)

    def read_texts(self, domains: Mapping[str, Rows], processing_class: PreTrainedTokenizerBase | None) -> None:
        """Tokenize the texts and cut them into blocks that every model can read."""
        if not domains:
            raise ArgumentError("Expected at least one text.")
        self.tokenizer = processing_class or self._find_tokenizer()
        configs = [self._config(name) for name in self.models]
        sizes = {name: config.vocab_size for name, config in zip(self.models, configs)}
        if len(set(sizes.values())) > 1:
            raise ArgumentError(
                "Outputs can only be compared over one vocabulary, but these models have different sizes: "
                f"{', '.join(f'{name} {size}' for name, size in sizes.items())}. Resize their embeddings alike."
            )
        self.vocab_size = next(iter(sizes.values()))
        # Models with relative positions, and those that extrapolate without limit, have no such entry.
        limits = [getattr(config, "max_position_embeddings", None) for config in configs]
        limit = min((limit for limit in limits if limit), default=None)
        self.texts = {
            domain: cut(token_stream(self.tokenizer, rows), self.options.block_size, self.vocab_size, limit)
            if self.options.packing
            else separate_rows(self.tokenizer, rows, self.vocab_size, limit)
            for domain, rows in domains.items()
        }
        self.format = OutputFormat(self.vocab_size, self.options.top_k)

    def _find_tokenizer(self) -> PreTrainedTokenizerBase | None:
        donors = [self.base, *self.sources.values()]
        for source in donors:
            if source is not None and any(Path(source.path).glob("tokenizer*")):
                return transformers.AutoTokenizer.from_pretrained(source.path)
        return None

    def _config(self, name: str) -> Any:
        model: Any = self.models[name]
        if isinstance(model, torch.nn.Module):
            return model.config
        source = self.sources[name]
        if source.kind == "adapter":
            assert self.base is not None  # checked when sources were looked up
            source = self.base
        return transformers.AutoConfig.from_pretrained(source.path).get_text_config()

    def open_cache(self, folder: Path) -> None:
        """Find out what each model's results would be called."""
        shared: list[Any] = [None]
        if self.accelerator.is_main_process:
            keys = {name: self._key(name) for name in self.models}
            shared = [(secrets.token_hex(4), keys)]
        broadcast_object_list(shared)
        run, self.keys = shared[0]
        self.cache = OutputCache(folder, run)

    def _key(self, name: str) -> str:
        if name not in self.sources:
            return f"live-{secrets.token_hex(8)}"
        return key_of(
            {
                "format": FORMAT,
                "versions": [torch.__version__, transformers.__version__],
                "model": model_identity(self.sources[name], self.base),
                "tokens": [tokens_identity(text.tokens) for text in self.texts.values()],
                "labels": [tokens_identity(text.labels) for text in self.texts.values()],
                "bounds": [tokens_identity(torch.tensor(text.bounds)) for text in self.texts.values()],
                "options": [
                    str(self.options.dtype),
                    self.options.top_k,
                    self.options.n_prompts,
                    self.options.max_new_tokens,
                ],
            }
        )

    def measure_all(
        self,
        on_model: Callable[[str], object] | None,
        on_prediction_step: Callable[[DataLoader], None] | None,
    ) -> None:
        """Run every model of which anything is missing in the cache."""
        loader = ModelLoader(self.base, self.options.dtype, self.options.device_map)
        names = list(self.models)
        for number, name in enumerate(names):
            wanted = {self.keys[name]: self.format.columns}
            wanted |= {self._pair(name, other): PAIR_COLUMNS for other in names[:number]}
            missing = self._agree([key for key, columns in wanted.items() if not self._is_whole(key, columns)])
            if not missing:
                continue
            if on_model is not None:
                on_model(name)
            given = self.models[name]
            model = given if isinstance(given, torch.nn.Module) else loader.load(self.sources[name])
            self._measure(name, model, names[:number], missing, on_prediction_step)
            if model is not given:
                loader.release(model)
            del model

    def _is_whole(self, key: str, columns: Columns) -> bool:
        """Tell whether results are in the cache; damaged ones are removed."""
        for number, blocks in enumerate(self.texts.values()):
            path = table_file(self.cache.path(key), number)
            try:
                if path.exists():  # there are none of models that do not predict the next token
                    TokenTable(path, blocks.n_predictions, columns).open().close()
            except ValueError:
                self.cache.discard_all_of(key)
        return self.cache.has(key)

    def _agree(self, value: Any) -> Any:
        """Return the main process's value on all."""
        shared = [value]
        broadcast_object_list(shared)
        return shared[0]

    def _pair(self, model: str, other: str) -> str:
        return f"{self.keys[model]}-{self.keys[other]}"

    def _measure(
        self,
        name: str,
        model: torch.nn.Module,
        others: Sequence[str],
        missing: Sequence[str],
        on_prediction_step: Callable[[DataLoader], None] | None,
    ) -> None:
        key, is_main = self.keys[name], self.accelerator.is_main_process
        causal = predicts_next_token(model)
        if is_main:
            for new in missing:
                self.cache.begin(new)
        self.accelerator.wait_for_everyone()
        statistics = measure_model(
            model,
            list(self.texts.values()),
            output=self.cache.unfinished(key) if causal and key in missing else None,
            output_format=self.format,
            comparisons=[
                Comparison(self.cache.path(self.keys[other]), self.cache.unfinished(self._pair(name, other)))
                for other in others
                if causal and self._pair(name, other) in missing
            ],
            batch_size=self.options.batch_size,
            accelerator=self.accelerator,
            on_prediction_step=on_prediction_step,
        )
        generations = self._generate(name, model) if causal and key in missing else []
        if is_main:
            if key in missing:
                measured = {
                    "causal": causal,
                    "n_tokens": statistics.n_tokens,
                    "n_features": statistics.n_features,
                    "layers": [asdict(row) for row in statistics.results(name)],
                    "generations": [asdict(row) for row in generations],
                }
                write_file(self.cache.unfinished(key) / _MEASURED, json.dumps(measured))
            for new in missing:
                self.cache.publish(new)
        self.accelerator.wait_for_everyone()

    def _generate(self, name: str, model: torch.nn.Module) -> list[Generation]:
        """Let the model go on after the first tokens of every text, and of as many more places as are asked for."""
        if self.options.n_prompts == 0:
            return []
        # All of one length, so that they are one batch without padding.
        shortest = min(min(len(blocks.tokens), blocks.block_size // 2) for blocks in self.texts.values())
        length = min(self.options.max_new_tokens, shortest)
        domains, prompts = [], []
        for domain, blocks in self.texts.items():
            stride = max(len(blocks.tokens) // self.options.n_prompts, 1)
            for start in range(0, len(blocks.tokens) - length + 1, stride)[: self.options.n_prompts]:
                domains.append(domain)
                prompts.append(blocks.tokens[start : start + length])
        continuations = continue_greedily(model, torch.stack(prompts), self.options.max_new_tokens)
        return [
            Generation(name, domain, self.decode(prompt.tolist()), self.decode(added), repetition(added), entropy)
            for domain, prompt, (added, entropy) in zip(domains, prompts, continuations)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text; without a tokenizer, their numbers."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return str(self.tokenizer.decode(list(tokens)))

    def record(self, weights: Mapping[str, float] | None) -> EvaluationRecord:
        """Put together what was found, from the cache alone."""
        record = EvaluationRecord(models=dict(self.roles), weights=_weights(weights, self.roles))
        record.settings = {
            "block_size": max(text.block_size for text in self.texts.values()),
            "packing": self.options.packing,
            "dtype": str(self.options.dtype).removeprefix("torch."),
            "top_k": 0 if self.format.is_exact else self.options.top_k,
            "n_processes": self.accelerator.num_processes,
        }
        causal = []
        for name in self.models:
            measured = json.loads((self.cache.path(self.keys[name]) / _MEASURED).read_text(encoding="utf-8"))
            # The same model may be in the cache under another name.
            record.layers += [LayerActivations(**{**row, "model": name}) for row in measured["layers"]]
            record.generations += [Generation(**{**row, "model": name}) for row in measured["generations"]]
            if measured["causal"]:
                causal.append(name)
        # All models read the same tokens, and their layers are equally wide.
        record.settings |= {"n_tokens": measured["n_tokens"], "n_features": measured["n_features"]}
        if measured["n_tokens"] <= measured["n_features"]:
            logger.warning(
                "Effective ranks come from %d tokens in %d dimensions, fewer than it takes to fill them: compare them "
                "with each other only, or evaluate on more text.",
                measured["n_tokens"],
                measured["n_features"],
            )
        for number, domain in enumerate(self.texts):
            self._add_domain(record, number, domain, causal)
        record.recovery = recovery_rows(record)
        return record

    def _add_domain(self, record: EvaluationRecord, number: int, domain: str, causal: Sequence[str]) -> None:
        blocks = self.texts[domain]
        targets = blocks.targets.numpy()
        tables = {name: self._open(self.keys[name], number, self.format.columns) for name in causal}
        pairs = {
            (one, two): self._open(self._pair(one, two), number, PAIR_COLUMNS)
            for place, one in enumerate(causal)
            for two in causal[:place]
        }
        for name, table in tables.items():
            found = metrics_of(table.read("log_prob"), float(np.mean(table.read("first") == targets)))
            metrics = {"loss": found.loss, "perplexity": found.perplexity, "token_accuracy": found.token_accuracy}
            record.scores.append(Score(name, domain, metrics, found.n_tokens, blocks.n_samples))
        record.distances += [summarise(one, two, domain, table) for (one, two), table in pairs.items()]
        experts = [name for name in record.experts if name in causal]
        if MERGED in causal and experts:
            record.objectives.append(objective(domain, experts, record.weights, pairs))
            for expert in experts:
                record.worst_tokens += worst_tokens(
                    expert, domain, blocks, tables, pairs[MERGED, expert], self.decode, self.options.n_worst
                )
        for table in [*tables.values(), *pairs.values()]:
            table.close()

    def _open(self, key: str, number: int, columns: Any) -> TokenTable:
        n_rows = list(self.texts.values())[number].n_predictions
        return TokenTable(table_file(self.cache.path(key), number), n_rows, columns).open()

    def clean_up(self) -> None:
        """Remove what was left unfinished, and results of models in memory, which nobody could find again."""
        if self.accelerator.is_main_process:
            self.cache.clear()
            for key in self.keys.values():
                if key.startswith("live-"):
                    self.cache.discard_all_of(key)


def _weights(weights: Mapping[str, float] | None, roles: Mapping[str, Role]) -> dict[str, float]:
    experts = [name for name, role in roles.items() if role == "expert"]
    given = dict.fromkeys(experts, 1.0) if weights is None else {name: weights[name] for name in experts}
    total = sum(given.values())
    return {name: weight / total for name, weight in given.items()}
