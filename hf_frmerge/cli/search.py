"""`frmerge search`: choose the weights of the experts by measuring merges."""

from __future__ import annotations

import json
from typing import Any

import click

from hf_frmerge.cli.command import FrmergeCommand
from hf_frmerge.cli.evaluating import (
    bench_arguments,
    bench_bar,
    measured_into,
    models_and_data,
    named_files,
    numbers,
    option,
)
from hf_frmerge.cli.options import options_from

_SEARCH = "What is searched"
_SHARED = {
    "What all merges share": ("allow_license", "strict"),
    "Running": ("memory_budget", "num_workers", "device"),
}


@click.command(
    "search",
    cls=FrmergeCommand,
    on_interrupt="What is measured is kept: run the same command again to go on.",
)
@click.argument("experts", nargs=-1, required=True, metavar="EXPERT EXPERT ...")
@models_and_data("weights")
@option(
    _SEARCH,
    "--by",
    type=click.Choice(["pareto", "bayesian", "nested", "greedy"]),
    default="pareto",
    show_default=True,
    help="pareto: measure merges all over the weights, and find by quadratic surrogates what is best for some text. "
    "bayesian: half of them where the surrogates are least sure. nested: join the experts two by two, for many of "
    "them. greedy: average experts, the best first, as long as the score does not fall.",
)
@option(
    _SEARCH,
    "--method",
    metavar="NAME[,OPTION=VALUE...]",
    default="linear",
    show_default=True,
    help="Method of all merges, such as karcher or ties,density=0.3.",
)
@option(
    _SEARCH,
    "--scales",
    metavar="S[,S]",
    help="Smallest and largest factor of the merged deltas, or one. [default: 0.5,2; greedy: 1]",
)
@option(
    _SEARCH,
    "--evaluations",
    "n_evaluations",
    type=click.IntRange(min=1),
    help="Merges that the surrogates are fitted to; with nested, of every pair. Default: twice as many as a quadratic "
    "function has coefficients, which is 12 for two experts, 20 for three, 30 for four.",
)
@option(
    _SEARCH, "--seed", type=click.IntRange(min=0), default=42, show_default=True, help="Seed of all that is drawn."
)
@measured_into(
    "search",
    again="The same command goes on in it, and another search of the same models adds to it.",
    anew="measurements of something else",
)
@options_from(_SHARED)
def search(
    experts: tuple[str, ...],
    data: tuple[str, ...],
    base_model: str | None,
    scales: str | None,
    batch_size: int,
    block_size: int,
    dtype: str,
    as_json: bool,
    by: Any,
    method: str,
    n_evaluations: int | None,
    max_tokens: int,
    cache_dir: str | None,
    **options: Any,
) -> None:
    """
    Choose the weights of your experts by measuring merges.

    Merges are made in memory and measured on some of the texts; those that are chosen are measured on the others,
    beside equal weights. Prints one table, best first, and the command that makes each of them. A front of more
    than three experts needs pymoo: pip install 'hf_frmerge[pareto]'.
    """
    files = named_files(data)
    factors = numbers("--scales", scales) if scales is not None else None
    args = bench_arguments(batch_size, block_size, options)
    with bench_bar() as (on_model, on_prediction_step):
        from hf_frmerge.evaluation.text.datasets import read_texts
        from hf_frmerge.search.weight_search import WeightSearch

        record = WeightSearch(
            experts,
            {name: read_texts(file) for name, file in files.items()},
            base_model,
            by=by,
            method=method,
            scales=factors,
            n_evaluations=n_evaluations,
            args=args,
            max_tokens=max_tokens,
            eval_dtype=dtype,
            cache_dir=cache_dir,
            on_progress=on_model,
            on_prediction_step=on_prediction_step,
        ).run()
    if as_json:
        click.echo(json.dumps(record.to_dict(), indent=2, ensure_ascii=False))
        return
    from hf_frmerge.cli.render.search import print_search

    print_search(record, args.output_dir)


COMMANDS = {"search": search}
