"""`frmerge demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hf_frmerge.cli.command import FrmergeCommand, results_only, yield_idle_cores


@click.command("demo", cls=FrmergeCommand, on_interrupt="Run it again: the converted base model is kept.")
@click.option("--output-dir", metavar="DIR", default="./frmerge-demo", show_default=True, help="Folder for the model.")
def demo(output_dir: str) -> None:
    """
    Merge three small real experts, compare the methods, and see.

    Takes a few minutes on two cores, nothing is downloaded. The experts are LoRA adapters of SmolLM2-135M for Jane
    Austen's prose, the King James Bible and Python code.
    """
    yield_idle_cores()  # before the imports below, which import torch
    with results_only():
        from tqdm import tqdm
        from transformers.utils.logging import disable_progress_bar

        from hf_frmerge.demo.run import BASE, PROMPT, conclusions, run_demo
        from hf_frmerge.evaluation.record import Score
        from hf_frmerge.evaluation.suite.build_record import recovered
        from hf_frmerge.merging.record.manifest import REPORT_FILE

        disable_progress_bar()  # models are loaded ten times; converting the base model switches the bars on again
        bars: list[
            tqdm[Any]
        ] = []  # opened at the first score, so that it does not mix with the bars of the conversion

        def on_score(score: Score, total: int) -> None:
            if not bars:
                bars.append(tqdm(total=total, desc="Evaluating", unit="text"))
            bars[0].set_postfix_str(
                f"{score.model} on {score.domain}: {score.metrics['perplexity']:.2f}", refresh=False
            )
            bars[0].update()

        try:
            result = run_demo(output_dir, tell=tqdm.write, on_score=on_score)
        finally:
            for bar in bars:
                bar.close()
    from hf_frmerge.cli.render.evaluation import print_findings, print_functions
    from hf_frmerge.cli.render.scores import print_recovery, print_scores
    from hf_frmerge.cli.render.terminal import console, human_seconds
    from hf_frmerge.wording.metrics import METRICS

    out = console()
    out.print(result.verdict)
    print_scores(result.scores, result.merged, title=f"{METRICS['perplexity'].heading}, on held-out text")
    print_recovery(recovered(result.scores, result.merged, result.experts, BASE))
    print_functions(result.record)
    print_findings(result.record)
    out.print("\nWhat the numbers say (perplexities are geometric means over the texts):", style="bold")
    for sentence in conclusions(result.scores, result.angles):
        out.print(f"- {sentence}")
    out.print("\nThe merge that was fitted, reloaded, goes on after", repr(PROMPT))
    out.print(f"  {PROMPT}{result.continuation}", style="italic")
    out.print(f"\nModel, record and card: {output_dir}   Check it: frmerge verify {output_dir}", style="bold")
    page = Path(output_dir) / REPORT_FILE
    if page.exists():
        out.print(f"All of it on one page, to open in a browser: {page}", style="bold")
    out.print(f"The demo took {human_seconds(result.seconds)}.")


COMMANDS = {"demo": demo}
