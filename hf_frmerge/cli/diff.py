"""`frmerge diff`: compare two merges."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from hf_frmerge.cli.command import FAILURE, FrmergeCommand, results_only, token_option


@click.command("diff", cls=FrmergeCommand)
@click.argument("a")
@click.argument("b")
@token_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, token: str | None, as_json: bool) -> None:
    """
    Explain how two merges differ: sources, weights, arguments, versions, coefficients, tensors, evaluation.

    A and B are folders of merges, or Hub ids of pushed ones; only their records are read. As with diff(1), the exit
    code is 0 if the two models are the same bit for bit, and 1 if not.
    """
    with results_only():
        from hf_frmerge.provenance.diff import diff_merges

        result = diff_merges(a, b, token=token)
    if as_json:
        click.echo(json.dumps({"same_model": result.same_model, **asdict(result)}, indent=2))
    else:
        from hf_frmerge.cli.render.diff import print_diff

        print_diff(result, a, b)
    ctx.exit(0 if result.same_model else FAILURE)


COMMANDS = {"diff": diff}
