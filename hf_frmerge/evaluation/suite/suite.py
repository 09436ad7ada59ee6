"""Evaluate the language models of a merge: all measures, in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_frmerge.evaluation.measures.token_tables import OutputFormat
from hf_frmerge.evaluation.models.loading import ModelLoader, predicts_next_token
from hf_frmerge.evaluation.record import EvaluationRecord, Generation
from hf_frmerge.evaluation.suite.build_record import build_record, expert_weights
from hf_frmerge.evaluation.suite.inputs import Inputs, find_inputs
from hf_frmerge.evaluation.suite.measure_model import Comparison, measure_model
from hf_frmerge.evaluation.suite.result_store import Measured, ResultStore
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.text.generation import continue_greedily, repetition
from hf_frmerge.evaluation.text.token_blocks import Rows


def evaluate_suite(
    models: ModelSet,
    domains: Mapping[str, Rows],
    options: SuiteOptions | None = None,
    run: RunSettings | None = None,
) -> EvaluationRecord:
    """
    Measure scores, function distances, activations and generations of models on texts.

    Every model reads every text once, and everything is measured in that pass. Models are loaded one at a time, the
    merged one last. Results are cached in `run.cache_dir` under the content of weights, texts and options, and a model
    in the cache is not loaded. Results of models in memory are not cached.

    Args:
        models (`ModelSet`):
            Models, with their roles.
        domains (`Mapping[str, Iterable]`):
            Name of a text -> rows of text or tokens, as for `evaluate_causal_lm`.
        options (`SuiteOptions`, *optional*):
            How to measure.
        run (`RunSettings`, *optional*):
            Where to run, and callbacks.

    Returns:
        `EvaluationRecord`: models that do not predict the next token have activations only.

    Raises:
        ArgumentError: If there is no model or no text, a role is missing, an adapter has no base, the models have
            vocabularies of different sizes, or a text cannot be used.
        CheckpointError: If a model is missing or broken.
    """
    options, run = options or SuiteOptions(), run or RunSettings()
    inputs = find_inputs(models, domains, block_size=options.block_size, packing=options.packing)
    weights = expert_weights(models.weights, inputs.roles)
    store = ResultStore(
        Path(run.cache_dir) if run.cache_dir is not None else default_cache_dir(),
        inputs,
        OutputFormat(inputs.vocab_size, options.top_k),
        [str(options.dtype), options.n_prompts, options.max_new_tokens],
        run.accelerator,
    )
    try:
        _Suite(inputs, store, options, run).measure_all()
        record = build_record(inputs, store, weights, options.n_worst, run.on_log_probs)
        run.accelerator.wait_for_everyone()  # no process may still read what clean_up removes
    finally:
        store.clean_up()
    record.settings |= {
        "dtype": str(options.dtype).removeprefix("torch."),
        "packing": options.packing,
        "n_processes": run.accelerator.num_processes,
    }
    return record


def default_cache_dir() -> Path:
    """Return the default folder of the cache."""
    configured = os.environ.get("HF_FRMERGE_CACHE")
    root = Path(configured).expanduser() if configured else Path.home() / ".cache" / "hf_frmerge"
    return root / "evaluation"


@dataclass(frozen=True)
class _Suite:
    """Run the models whose results are not all in the cache."""

    inputs: Inputs
    store: ResultStore
    options: SuiteOptions
    run: RunSettings

    def measure_all(self) -> None:
        """Measure the models in order; each is compared with those before it."""
        loader = ModelLoader(self.inputs.base, self.options.dtype, self.options.device_map)
        names = list(self.inputs.roles)
        for number, name in enumerate(names):
            missing = self.store.missing(name, names[:number])
            if not missing:
                continue
            if self.run.on_model is not None:
                self.run.on_model(name)
            if name in self.inputs.live:
                self._measure(name, self.inputs.live[name], names[:number], missing)
            else:
                model = loader.load(self.inputs.sources[name])
                self._measure(name, model, names[:number], missing)
                loader.release(model)
                del model  # the last reference; only one model may be in memory when the next is loaded

    def _measure(self, name: str, model: torch.nn.Module, others: Sequence[str], missing: Sequence[str]) -> None:
        """Run a model, and write the results under the missing keys."""
        store, key = self.store, self.store.key(name)
        has_pairs = any(text.sources for text in self.inputs.texts.values())
        causal, is_new = predicts_next_token(model) or has_pairs, key in missing
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
            accelerator=self.run.accelerator,
            on_prediction_step=self.run.on_prediction_step,
        )
        if is_new:
            generations = self._generate(name, model) if causal else []
            if self.run.accelerator.is_main_process:
                layers = statistics.results(name)
                measured = Measured(causal, statistics.n_tokens, statistics.n_features, layers, generations)
                store.write_measured(key, measured)
        store.publish(missing)

    def _generate(self, name: str, model: torch.nn.Module) -> list[Generation]:
        """
        Continue `n_prompts` prompts of every text, which begin at equal distances, the first at its start.

        Encoder-decoders are not asked to: what they write belongs to their task, and is no continuation.
        """
        n_prompts, texts = self.options.n_prompts, self.inputs.texts
        if n_prompts == 0 or any(text.sources for text in texts.values()):
            return []
        # Prompts of one length form a batch without padding, which could change what a model generates.
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
