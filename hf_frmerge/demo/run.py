"""The demo: fit a merge of three small real experts, measure it, and compare it with merges without data."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
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
from hf_frmerge.wording.comparison import named, score
from hf_frmerge.wording.inspection import inspection_verdict

if TYPE_CHECKING:
    from hf_frmerge.evaluation.comparison_record import ComparisonRecord, MethodResult
    from hf_frmerge.evaluation.record import EvaluationRecord

BASE = "base"
N_PROMPTS = 16  # that every expert writes, and the merge is fitted to; more gain little and take longer
# Without data: what is compared on any experts is about ten, of which these are one of a kind each.
METHODS = ("karcher", "nre", "linear", "ties", "tsv_m", "karcher,space=weights")
SCALES = (0.5, 0.7, 1.0)
# Enough text to resolve differences of a few percent between methods, but quick to evaluate on two slow cores.
EXCERPT_CHARS = 7_000
PROMPT = "It was a bright morning, and"


@dataclass(frozen=True)
class DemoResult:
    """
    Results of the demo.

    Attributes:
        comparison: the merge that is kept, beside merges without data.
        comparison_dir: folder of the comparison, with its page where there is matplotlib.
        record: full evaluation of the merge that is kept.
        verdict: verdict of `frmerge inspect` on the experts.
        continuation: continuation of `PROMPT` by the reloaded merge.
        seconds: run time of the whole demo.
    """

    comparison: ComparisonRecord
    comparison_dir: str
    record: EvaluationRecord
    verdict: str
    continuation: str
    seconds: float


def run_demo(output_dir: str, tell: Callable[[str], None], on_step: Callable[[str], None]) -> DemoResult:
    """
    Fit a merge to the demo's experts, write and measure it, and compare it with what methods without data give.

    Args:
        output_dir (`str`):
            Folder for the merged model; the comparison has that name with `-comparison`. The output of an earlier
            demo is replaced.
        tell (`Callable[[str], None]`):
            Called with a progress message before every stage.
        on_step (`Callable[[str], None]`):
            Called with the name of every model or merge before it is measured for the comparison.

    Raises:
        MergeError: If the base model's weights are not installed, or the output folder has other files.
    """
    import torch

    started = time.perf_counter()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    tell("Base model: SmolLM2-135M-Instruct. The first run converts it, which takes a minute.")
    base = str(base_model_dir())
    experts = {name: str(path) for name, path in expert_dirs().items()}
    texts = {name: [_excerpt(text)] for name, text in load_texts().items()}
    tell(f"Experts: LoRA adapters for {', '.join(experts)}. Measuring the angles between them.")
    verdict = _verdict(list(experts.values()), base)
    tell(f"Merging them into {output_dir}: every expert writes {N_PROMPTS} prompts, to which the merge is fitted.")
    _merge(list(experts.values()), base, output_dir)
    dtype = _faster_dtype()
    tell("Held-out text: what that merge did to the function and to the activations, beside base and experts.")
    record = _measure(output_dir, base, experts, texts, dtype, tell)
    tell(f"Comparing it with what {len(METHODS)} methods without data make of the experts, at {len(SCALES)} scales.")
    comparison_dir = f"{output_dir.rstrip('/')}-comparison"
    comparison = _compare(experts, base, texts, output_dir, comparison_dir, dtype, on_step)
    tell(f"Reloading {output_dir} with AutoModelForCausalLM.from_pretrained.")
    continuation = generate(output_dir, PROMPT)
    return DemoResult(comparison, comparison_dir, record, verdict, continuation, time.perf_counter() - started)


def conclusions(record: ComparisonRecord) -> list[str]:
    """Say what a comparison of `METHODS` shows about means on the sphere, also where the Karcher mean is not best."""
    rows = {row.label: row for row in record.methods}
    karcher, nre, linear, in_weights = (rows[label] for label in ("karcher", "nre", "linear", "karcher space=weights"))
    spread = max(row.score for row in (karcher, nre, linear)) - min(row.score for row in (karcher, nre, linear))
    told = "no more than the text can tell" if spread < linear.error else "more than the standard error of the text"

    def kept(row: MethodResult) -> str:
        return f"{named(row)} {score(record, row.score)}"

    at_one = ", ".join(_at_scale_1(record, row) for row in (karcher, nre, linear))
    return [
        f"Without data, each at the scale that suits it: {kept(karcher)}, {kept(nre)} (norm-rescaled average), "
        f"{kept(linear)} (plain average). They differ by {100 * spread:.1f} points, {told}.",
        f"At scale 1, where they differ in length, on the texts the scale was chosen on: {at_one}.",
        f"The Karcher mean of the weights themselves, where all means are nearly one: {kept(in_weights)}.",
    ]


def _at_scale_1(record: ComparisonRecord, row: MethodResult) -> str:
    return next(f"{row.label} {score(record, one.score)}" for one in row.tried if one.scale == 1.0)


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


def _merge(experts: list[str], base: str, output_dir: str) -> None:
    """Merge without progress output: the demo shows its own."""
    args = MergingArguments(
        output_dir=output_dir,
        adapter_output="merged",
        num_calibration_samples=N_PROMPTS,
        overwrite=(Path(output_dir) / MANIFEST_FILE).exists(),  # of an earlier demo
        logging_steps=10**9,
    )
    merger = FisherRaoMerger(experts, args=args, base_model=base, calibration_dataset="self")
    merger.remove_callback(ProgressCallback)
    merger.merge()


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


def _compare(
    experts: Mapping[str, str],
    base: str,
    texts: Mapping[str, list[str]],
    merged: str,
    folder: str,
    dtype: str,
    on_step: Callable[[str], None],
) -> ComparisonRecord:
    """Compare the merge in the folder `merged` with `METHODS`; write the comparison and its page."""
    from hf_frmerge.comparison.comparison import MergeComparison
    from hf_frmerge.report.comparison_page import write_comparison_page
    from hf_frmerge.report.figures import can_draw

    comparison = MergeComparison(
        list(experts.values()),
        texts,
        base,
        methods=METHODS,
        scales=SCALES,
        args=MergingArguments(output_dir=folder, overwrite=True, per_device_eval_batch_size=4),
        also=[merged],
        max_tokens=0,
        eval_dtype=dtype,
        on_progress=on_step,
    )
    record = comparison.run()
    if can_draw():
        write_comparison_page(folder)
    return record
