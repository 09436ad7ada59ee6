"""`frmerge compare`: try merge methods on the user's experts and texts, and say which is best."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hf_frmerge.cli.command import FrmergeCommand, results_only
from hf_frmerge.cli.evaluating import (
    bench_arguments,
    bench_bar,
    measured_into,
    models_and_data,
    named_files,
    numbers,
    option,
)
from hf_frmerge.cli.options import CALIBRATION, options_from
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.calibration import SELF_WRITTEN, parse_calibration
from hf_frmerge.merging.arguments.named_weights import is_name, parse_name

_TRIED = "What is tried"
_SHARED = {
    "What all merges share": (
        "post_step",
        "svc_floor",
        "layer_scales",
        "leave_out",
        "take",
        "settings_from",
        "allow_license",
        "strict",
    ),
    "Running": ("memory_budget", "num_workers", "device"),
}


@click.command(
    "compare",
    cls=FrmergeCommand,
    on_interrupt="What is finished is kept: run the same command again to go on.",
)
@click.argument("experts", nargs=-1, required=True, metavar="EXPERT EXPERT ...")
@models_and_data("scales")
@option(
    _TRIED,
    "--method",
    "methods",
    multiple=True,
    metavar="NAME[,OPTION=VALUE...]",
    help="Method to try: ties,density=0.3 or karcher,space=weights, say; once per method. With --calibration also "
    "those that need prompts, as regmean. Default: about ten.",
)
@option(
    _TRIED,
    "--scales",
    metavar="S,S,...",
    help="Factors of the merged deltas that every method is tried with. [default: 0.5,0.7,1,1.4,2]",
)
@option(
    _TRIED,
    "--weights",
    multiple=True,
    metavar="W,W,...|NAME",
    help="Weights of the experts that every method is tried with, or their name: nan, say. May be given several "
    "times. Default: all alike.",
)
@option(
    _TRIED,
    "--seeds",
    "n_seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How often methods that draw at random are repeated; their score is the mean, and the spread is told.",
)
@option(_TRIED, "--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Seed of all that is drawn.")
@option(
    _TRIED,
    "--also",
    multiple=True,
    metavar="MODEL",
    help="Merge that is there already, whatever made it, to compare as it is: folder or Hub id; once per model.",
)
@measured_into(
    "comparison",
    again="The same command goes on in it, and one with more methods adds to it.",
    anew="another comparison",
)
@options_from(CALIBRATION, _SHARED)
def compare(
    experts: tuple[str, ...],
    data: tuple[str, ...],
    base_model: str | None,
    methods: tuple[str, ...],
    scales: str | None,
    weights: tuple[str, ...],
    calibration: tuple[str, ...],
    also: tuple[str, ...],
    n_seeds: int,
    max_tokens: int,
    batch_size: int,
    block_size: int,
    dtype: str,
    cache_dir: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """
    Compare merge methods on your experts and texts.

    Every method is tried with the same scales; the best on some of the texts is measured on the others. With
    --calibration a merge that is fitted to its experts is compared with them. Models are merged in memory, none is
    written. Prints one table, best first, which of the methods cannot be told from the best, and the command that
    makes the best merge; a page with figures is beside the results.
    """
    files = named_files(data)
    factors = numbers("--scales", scales) if scales is not None else None
    chosen_weights = [_weights(text) for text in weights] or None
    args = bench_arguments(batch_size, block_size, options)
    prompts = parse_calibration(calibration, experts) if calibration else None
    _check_held_out(prompts, files)
    with bench_bar() as (on_model, on_prediction_step):
        from hf_frmerge.comparison.candidates import SCALES
        from hf_frmerge.comparison.comparison import MergeComparison
        from hf_frmerge.evaluation.text.datasets import read_texts

        record = MergeComparison(
            experts,
            {name: read_texts(file) for name, file in files.items()},
            base_model,
            methods=methods,
            scales=factors or SCALES,
            weights=chosen_weights,
            args=args,
            calibration_dataset=prompts,
            also=also,
            n_seeds=n_seeds,
            max_tokens=max_tokens,
            eval_dtype=dtype,
            cache_dir=cache_dir,
            on_progress=on_model,
            on_prediction_step=on_prediction_step,
        ).run()
    page = _write_page(args.output_dir)
    if as_json:
        click.echo(json.dumps(record.to_dict(), indent=2, ensure_ascii=False))
        return
    from hf_frmerge.cli.render.comparison import print_comparison

    print_comparison(record, args.output_dir, page)


def _write_page(folder: str) -> Path | None:
    """Write the page with figures, where they can be drawn."""
    with results_only():
        from hf_frmerge.report.comparison_page import write_comparison_page
        from hf_frmerge.report.figures import can_draw

        return write_comparison_page(folder) if can_draw() else None


def _check_held_out(prompts: Mapping[str, str] | str | None, files: Mapping[str, str]) -> None:
    """Refuse prompts from a file that merges are measured on: a fit would have seen what it is judged by."""
    sources = prompts.values() if isinstance(prompts, Mapping) else [prompts] if prompts is not None else []
    for source in set(sources) - set(SELF_WRITTEN):
        for file in files.values():
            if Path(source).exists() and Path(file).exists() and Path(source).samefile(file):
                raise ArgumentError(
                    f"{file!r} is given as --data and as --calibration: a merge that was fitted to a text cannot be "
                    "compared on it. Give other text to one of them, or --calibration self."
                )


def _weights(text: str) -> list[float] | str:
    """Read weights, or check their name."""
    if not is_name(text):
        return numbers("--weights", text)
    parse_name(text)
    return text


COMMANDS = {"compare": compare}
