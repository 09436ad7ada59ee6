"""`frmerge demo`."""

from __future__ import annotations

from pathlib import Path

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

        from hf_frmerge.demo.run import PROMPT, conclusions, run_demo

        disable_progress_bar()  # models are loaded ten times; converting the base model switches the bars on again
        result = run_demo(output_dir, tell=tqdm.write, on_step=lambda name: tqdm.write(f"  {name}"))
    from hf_frmerge.cli.render.comparison import print_comparison
    from hf_frmerge.cli.render.evaluation import print_findings, print_functions, print_scores
    from hf_frmerge.cli.render.terminal import console, human_seconds
    from hf_frmerge.evaluation.comparison_record import COMPARISON_PAGE
    from hf_frmerge.merging.record.manifest import REPORT_FILE

    out = console()
    out.print(result.verdict)
    print_scores(result.record)
    print_functions(result.record)
    print_findings(result.record)
    out.print()
    page = Path(result.comparison_dir) / COMPARISON_PAGE
    print_comparison(result.comparison, result.comparison_dir, page if page.exists() else None)
    out.print("\nWhat the numbers say of the methods:", style="bold")
    for sentence in conclusions(result.comparison):
        out.print(f"- {sentence}")
    out.print("\nThe merge that was fitted, reloaded, goes on after", repr(PROMPT))
    out.print(f"  {PROMPT}{result.continuation}", style="italic")
    out.print(f"\nModel, record and card: {output_dir}   Check it: frmerge verify {output_dir}", style="bold")
    page = Path(output_dir) / REPORT_FILE
    if page.exists():
        out.print(f"All of it on one page, to open in a browser: {page}", style="bold")
    out.print(f"The demo took {human_seconds(result.seconds)}.")


COMMANDS = {"demo": demo}
