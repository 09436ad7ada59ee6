"""Everything that is measured of a merge, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_frmerge.evaluation.measures.token_tables import OutputFormat
from hf_frmerge.evaluation.models.loading import ModelLoader, predicts_next_token
from hf_frmerge.evaluation.record import EvaluationRecord, Generation, Role
from hf_frmerge.evaluation.suite.build_record import build_record, expert_weights
from hf_frmerge.evaluation.suite.inputs import Inputs, find_inputs
from hf_frmerge.evaluation.suite.measure_model import Comparison, measure_model
from hf_frmerge.evaluation.suite.result_store import ResultStore
from hf_frmerge.evaluation.text.generation import continue_greedily, repetition
from hf_frmerge.evaluation.text.token_blocks import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    options = options or SuiteOptions()
    accelerator = accelerator or Accelerator()
    inputs = find_inputs(
        models,
        domains,
        roles,
        block_size=options.block_size,
        packing=options.packing,
        base_model=base_model,
        processing_class=processing_class,
        token=token,
    )
    shares = expert_weights(weights, inputs.roles)
    store = ResultStore(
        Path(cache_dir) if cache_dir is not None else default_cache_dir(),
        inputs,
        OutputFormat(inputs.vocab_size, options.top_k),
        [str(options.dtype), options.n_prompts, options.max_new_tokens],
        accelerator,
    )
    suite = _Suite(inputs, store, options, accelerator, on_prediction_step)
    try:
        suite.measure_all(on_model)
        record = build_record(inputs, store, shares, options.n_worst)
        accelerator.wait_for_everyone()  # all have read what is removed next
    finally:
        store.clean_up()
    record.settings |= {
        "dtype": str(options.dtype).removeprefix("torch."),
        "packing": options.packing,
        "n_processes": accelerator.num_processes,
    }
    return record


def default_cache_dir() -> Path:
    """Return where results are kept unless the caller says otherwise."""
    configured = os.environ.get("HF_FRMERGE_CACHE")
    root = Path(configured).expanduser() if configured else Path.home() / ".cache" / "hf_frmerge"
    return root / "evaluation"


@dataclass(frozen=True)
class _Suite:
    """Runs the models of one evaluation of which anything is missing."""

    inputs: Inputs
    store: ResultStore
    options: SuiteOptions
    accelerator: Accelerator
    on_prediction_step: Callable[[DataLoader], None] | None

    def measure_all(self, on_model: Callable[[str], object] | None) -> None:
        loader = ModelLoader(self.inputs.base, self.options.dtype, self.options.device_map)
        names = list(self.inputs.roles)
        for number, name in enumerate(names):
            missing = self.store.missing(name, names[:number])
            if not missing:
                continue
            if on_model is not None:
                on_model(name)
            if name in self.inputs.live:
                self._measure(name, self.inputs.live[name], names[:number], missing)
            else:
                model = loader.load(self.inputs.sources[name])
                self._measure(name, model, names[:number], missing)
                loader.release(model)
                del model

    def _measure(self, name: str, model: torch.nn.Module, others: Sequence[str], missing: Sequence[str]) -> None:
        store, key = self.store, self.store.key(name)
        causal, is_new = predicts_next_token(model), key in missing
        store.begin(missing)
        statistics = measure_model(
            model,
            list(self.inputs.texts.values()),
            output=store.unfinished(key) if causal and is_new else None,
            output_format=store.format,
            comparisons=[
                Comparison(store.path(store.key(other)), store.unfinished(store.key(name, other)))
                for other in others
                if causal and store.key(name, other) in missing
            ],
            batch_size=self.options.batch_size,
            accelerator=self.accelerator,
            on_prediction_step=self.on_prediction_step,
        )
        if is_new:
            generations = self._generate(name, model) if causal else []
            if self.accelerator.is_main_process:
                measured = {
                    "causal": causal,
                    "n_tokens": statistics.n_tokens,
                    "n_features": statistics.n_features,
                    "layers": [asdict(row) for row in statistics.results(name)],
                    "generations": [asdict(row) for row in generations],
                }
                store.write_measured(key, measured)
        store.publish(missing)

    def _generate(self, name: str, model: torch.nn.Module) -> list[Generation]:
        """Let the model go on after the first tokens of every text, and of as many more places as are asked for."""
        n_prompts, texts = self.options.n_prompts, self.inputs.texts
        if n_prompts == 0:
            return []
        # All of one length, so that they are one batch without padding.
        shortest = min(min(len(blocks.tokens), blocks.block_size // 2) for blocks in texts.values())
        length = min(self.options.max_new_tokens, shortest)
        domains, prompts = [], []
        for domain, blocks in texts.items():
            stride = max(len(blocks.tokens) // n_prompts, 1)
            for start in range(0, len(blocks.tokens) - length + 1, stride)[:n_prompts]:
                domains.append(domain)
                prompts.append(blocks.tokens[start : start + length])
        continuations = continue_greedily(model, torch.stack(prompts), self.options.max_new_tokens)
        decode = self.inputs.decode
        return [
            Generation(name, domain, decode(prompt.tolist()), decode(added), repetition(added), entropy)
            for domain, prompt, (added, entropy) in zip(domains, prompts, continuations)
        ]
