"""The demo: merge three small real experts by three methods in two spaces, fit one merge, evaluate all."""

from __future__ import annotations

import gc
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_frmerge.demo.base import base_model_dir
from hf_frmerge.demo.texts import expert_dirs, load_texts
from hf_frmerge.merger import FisherRaoMerger
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.callbacks.progress import ProgressCallback
from hf_frmerge.merging.inspection import inspect_experts
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.record.manifest import MANIFEST_FILE
from hf_frmerge.wording.inspection import inspection_verdict

if TYPE_CHECKING:
    from hf_frmerge.evaluation.record import EvaluationRecord, Score

BASE = "base"
METHODS = ("linear", "nre", "karcher")
SPACES = ("deltas", "weights")
FINAL = "fitted to own prompts"  # the merge that stays in the output folder
N_PROMPTS = 16  # that every expert writes, and the merge is fitted to; more gain little and take longer
# Enough text to resolve differences of 1 % between methods, but quick to evaluate on two slow cores.
EXCERPT_CHARS = 7_000
PROMPT = "It was a bright morning, and"
# Differences in perplexity below this share count as none: a few thousand tokens do not resolve them.
NOISE = 0.01


@dataclass(frozen=True)
class DemoResult:
    """
    Results of the demo.

    Attributes:
        scores: perplexities of base, experts and merges on every held-out text.
        record: full evaluation of the merge that is kept.
        experts: names of the experts; each is also the name of the expert's own text.
        merged: names of the merges.
        angles: largest angle between two experts in any tensor, in radians, by space.
        verdict: verdict of `frmerge inspect` on the experts.
        continuation: continuation of `PROMPT` by the reloaded merge.
        seconds: run time of the whole demo.
    """

    scores: list[Score]
    record: EvaluationRecord
    experts: list[str]
    merged: list[str]
    angles: dict[str, float]
    verdict: str
    continuation: str
    seconds: float


def merge_name(method: str, space: str) -> str:
    """Return the name under which a merge is listed in tables, such as `karcher of deltas`."""
    return f"{method} of {space}"


def run_demo(output_dir: str, tell: Callable[[str], None], on_score: Callable[[Score, int], None]) -> DemoResult:
    """
    Merge the demo's experts, evaluate all models, and write the merge that is fitted to the experts, with its card.

    Args:
        output_dir (`str`):
            Folder for the merged model. The output of an earlier demo is replaced.
        tell (`Callable[[str], None]`):
            Called with a progress message before every stage.
        on_score (`Callable[[Score, int], None]`):
            Called after every measurement, with the total number of measurements.

    Raises:
        MergeError: If the base model's weights are not installed, or the output folder has other files.
    """
    import torch

    from hf_frmerge.evaluation.record import MERGED

    started = time.perf_counter()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    tell("Base model: SmolLM2-135M-Instruct. The first run converts it, which takes a minute.")
    base = str(base_model_dir())
    experts = {name: str(path) for name, path in expert_dirs().items()}
    texts = {name: [_excerpt(text)] for name, text in load_texts().items()}
    tell(f"Experts: LoRA adapters for {', '.join(experts)}. Measuring the angles between them.")
    verdict = _verdict(list(experts.values()), base)

    tell(f"Merging them into {output_dir}: every expert writes {N_PROMPTS} prompts, to which the merge is fitted.")
    _merge(list(experts.values()), base, _final_arguments(output_dir), calibration_dataset="self")

    scores: list[Score] = []
    merged, angles = [], dict.fromkeys(SPACES, 0.0)
    dtype = _faster_dtype()
    n_scores = (2 + len(experts) + len(SPACES) * len(METHODS)) * len(texts)

    def add(score: Score) -> None:
        scores.append(score)
        on_score(score, n_scores)

    tell("Held-out text: what that merge did to the function and to the activations, beside base and experts.")
    record = _measure(output_dir, base, experts, texts, dtype, tell)
    for score in record.scores:
        add(replace(score, model=FINAL) if score.model == MERGED else score)
    tell("Perplexity of every other merge on the same text.")
    with tempfile.TemporaryDirectory(prefix=".frmerge-demo-", dir=Path(output_dir).absolute().parent) as scratch:
        for report in _merges(experts, base, Path(scratch)):
            merged.append(merge_name(report["method"], report["space"]))
            angles[report["space"]] = max(angles[report["space"]], report["max_angle"]["max"])
            for score in _evaluate(merged[-1], report["output_dir"], texts, dtype):
                add(score)
    merged.append(FINAL)
    tell(f"Reloading {output_dir} with AutoModelForCausalLM.from_pretrained.")
    continuation = generate(output_dir, PROMPT)
    seconds = time.perf_counter() - started
    return DemoResult(scores, record, list(experts), merged, angles, verdict, continuation, seconds)


def conclusions(scores: Sequence[Score], angles: Mapping[str, float]) -> list[str]:
    """
    Put the results into sentences, including those in which the Karcher mean is not the best.

    Args:
        scores (`Sequence[Score]`): Scores of all models of the demo.
        angles (`Mapping[str, float]`): Largest angle between two experts in radians, by space.
    """
    perplexity = _mean_perplexity(scores)
    merged = {
        space: {merge_name(method, space): perplexity[merge_name(method, space)] for method in METHODS}
        for space in SPACES
    }
    linear, nre, karcher = merged["deltas"].values()
    spread = max(merged["weights"].values()) / min(merged["weights"].values()) - 1
    best = min((name for names in merged.values() for name in names), key=perplexity.__getitem__)
    coincide = ": at such angles all means are one" if spread < NOISE else ""
    return [
        f"Fitted to {N_PROMPTS} prompts an expert, which the experts wrote themselves, a merge scores "
        f"{perplexity[FINAL]:.2f}. The best without data is {best}, {perplexity[best]:.2f}: "
        f"{_difference(perplexity[FINAL], perplexity[best], 'the fit')}. The base scores {perplexity[BASE]:.2f}.",
        f"Deltas lie up to {angles['deltas']:.2g} rad apart. There the Karcher mean scores {karcher:.2f} and the "
        f"norm-rescaled average (nre) {nre:.2f}: {_difference(karcher, nre, 'Karcher')}.",
        f"Keeping the norm of the deltas (nre, {nre:.2f}) against averaging it away (linear, {linear:.2f}): "
        f"{_difference(nre, linear, 'keeping it')}.",
        f"Weights lie up to {angles['weights']:.2g} rad apart. There all methods agree to {spread:.2%}{coincide}.",
    ]


def generate(model_dir: str, prompt: str, max_new_tokens: int = 32) -> str:
    """Load a model folder as a user would, and return the greedy continuation of a prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _excerpt(text: str) -> str:
    """Cut a text after the last line that ends within `EXCERPT_CHARS`."""
    return text if len(text) <= EXCERPT_CHARS else text[: text.rindex("\n", 0, EXCERPT_CHARS)]


def _verdict(experts: list[str], base: str) -> str:
    with closing(build_plan(experts, MergingArguments(), base_model=base)) as plan:
        return inspection_verdict(inspect_experts(plan))


def _final_arguments(output_dir: str) -> MergingArguments:
    is_earlier_demo = (Path(output_dir) / MANIFEST_FILE).exists()
    return MergingArguments(
        output_dir=output_dir,
        adapter_output="merged",
        num_calibration_samples=N_PROMPTS,
        overwrite=is_earlier_demo,
    )


def _merges(experts: Mapping[str, str], base: str, scratch: Path) -> Iterator[dict[str, Any]]:
    """
    Merge by every method in both spaces, and yield the report of each merge. Its output is deleted before the next.

    Deltas are merged from the adapters, weights from full checkpoints made of the same adapters.
    """
    temporary = str(scratch / "merged")
    for space in SPACES:
        dense = [_densify(adapter, base, scratch / name) for name, adapter in experts.items() if space == "weights"]
        for method in METHODS:
            args = MergingArguments(output_dir=temporary, method=method, space=space, adapter_output="merged")
            yield _merge(dense or list(experts.values()), None if dense else base, args)
            shutil.rmtree(temporary)


def _merge(experts: list[str], base: str | None, args: MergingArguments, **data: Any) -> dict[str, Any]:
    """Merge without progress output, and return the report."""
    args.logging_steps = 10**9  # the demo shows its own progress bar
    merger = FisherRaoMerger(experts, args=args, base_model=base, **data)
    merger.remove_callback(ProgressCallback)
    return merger.merge().report


def _densify(adapter: str, base: str, folder: Path) -> str:
    """Merge an adapter into its base with PEFT and save the full checkpoint, as if all weights had been fine-tuned."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # In float32, so that each weight is rounded once.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    full = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    full.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def _evaluate(name: str, folder: str, texts: Mapping[str, list[str]], dtype: str) -> Iterator[Score]:
    """Load a model and yield its scores on every text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_frmerge.evaluation.record import Score
    from hf_frmerge.evaluation.text.forward import evaluate_causal_lm

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for domain, rows in texts.items():
        metrics = evaluate_causal_lm(model, tokenizer, rows, batch_size=4)
        yield Score(name, domain, metrics.by_name(), metrics.n_tokens)
    del model
    gc.collect()  # models have reference cycles, so `del` alone does not free their memory for the next one


def _faster_dtype() -> str:
    """
    Return the faster dtype on this machine, by a short measurement: `"auto"` (the models are bf16) or `"float32"`.

    Without bf16 instructions, processors emulate bf16 products, which takes much longer than float32.
    """
    import torch

    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        torch.mm(left, right)  # warm-up: the first call initialises the library
        started = time.perf_counter()
        for _ in range(5):
            torch.mm(left, right)
        seconds[dtype] = time.perf_counter() - started
    return "auto" if seconds[torch.bfloat16] <= seconds[torch.float32] else "float32"


def _measure(
    output_dir: str,
    base: str,
    experts: Mapping[str, str],
    texts: Mapping[str, list[str]],
    dtype: str,
    tell: Callable[[str], None],
) -> EvaluationRecord:
    """Evaluate the kept merge together with base and experts; write record, card with figures, and report page."""
    from hf_frmerge.evaluation.record import MERGED, save_record
    from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
    from hf_frmerge.evaluation.suite.suite import evaluate_suite
    from hf_frmerge.hub.card.describe import describe_merge
    from hf_frmerge.report.figures import figure_drawer
    from hf_frmerge.report.page import write_page

    models = ModelSet(
        specs={BASE: base, **experts, MERGED: output_dir},
        roles={BASE: "base", **dict.fromkeys(experts, "expert"), MERGED: "merged"},
    )
    run = RunSettings(on_model=lambda name: tell(f"  {'the merge' if name == MERGED else name}"))
    record = evaluate_suite(models, texts, SuiteOptions(batch_size=4, dtype=dtype), run)
    save_record(output_dir, record)
    if figure_drawer() is not None:  # without matplotlib there is no page
        write_page(output_dir)
    describe_merge(output_dir, draw=figure_drawer())
    return record


def _mean_perplexity(scores: Sequence[Score]) -> dict[str, float]:
    """Return the perplexity of each model, geometric mean over the texts."""
    losses: dict[str, list[float]] = {}
    for score in scores:
        losses.setdefault(score.model, []).append(score.metrics["loss"])
    return {model: math.exp(math.fsum(values) / len(values)) for model, values in losses.items()}


def _difference(ours: float, theirs: float, name: str) -> str:
    """Describe how a perplexity, that of `name`, compares with another."""
    change = ours / theirs - 1
    if abs(change) < NOISE:
        return f"no difference worth the name ({change:+.2%})"
    return f"{name} is {'better' if change < 0 else 'worse'} by {abs(change):.1%}"
