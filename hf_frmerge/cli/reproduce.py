"""`frmerge reproduce`: repeat a merge from its record, and compare the result."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from hf_frmerge.cli.command import FAILURE, FrmergeCommand, pickle_option, results_only, token_option
from hf_frmerge.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable


@click.command("reproduce", cls=FrmergeCommand)
@click.argument("model")
@click.option("--output-dir", metavar="DIR", help="Where to write the model. Default: nowhere, it is only compared.")
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="NAME=PATH",
    help="Where a model of the record (an expert, or the base) is now. Needed for those that were local folders.",
)
@click.option("--device", help="Where to compute. Default: where it was computed.")
@token_option
@pickle_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def reproduce(
    ctx: click.Context,
    model: str,
    output_dir: str | None,
    experts: tuple[str, ...],
    device: str | None,
    token: str | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """
    Make a merge again from its record, and say whether it is the same bit for bit.

    MODEL is the folder of a merge, or the Hub id of one that was pushed: of that only the record is fetched. Its
    experts are taken at the commits and with the arguments recorded there. The exit code is 1 if anything differs.
    """
    places = _places(experts)
    with results_only():
        from tqdm import tqdm

        from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
        from hf_frmerge.provenance.merge_again import reproduce as make_again

        with tqdm(desc="Merging again", unit=" tensors") as bar:

            class Advance(StepObserver):
                def end(self, outcome: StepOutcome) -> bool:
                    bar.update()
                    return True

            result = make_again(
                model,
                output_dir,
                experts=places,
                device=device,
                token=token,
                allow_pickle=allow_pickle,
                observer=Advance(),
            )
        if output_dir is not None:
            from hf_frmerge.hub.card.describe import describe_merge

            describe_merge(output_dir)
    if as_json:
        click.echo(json.dumps({"identical": result.identical, **asdict(result)}, indent=2))
    else:
        from hf_frmerge.cli.render.merges import print_reproduction

        print_reproduction(result, model)
    ctx.exit(0 if result.identical else FAILURE)


def _places(experts: Iterable[str]) -> dict[str, list[str]]:
    """
    Parse the `--expert` options: `["math=a", "math=b"]` -> `{"math": ["a", "b"]}`.

    Raises:
        ArgumentError: If one is not `NAME=PATH`.
    """
    places: dict[str, list[str]] = {}
    for item in experts:
        name, separator, path = item.partition("=")
        if not (separator and name and path):
            raise ArgumentError(f"--expert takes NAME=PATH, such as --expert math=./math, but got {item!r}.")
        places.setdefault(name, []).append(path)
    return places


COMMANDS = {"reproduce": reproduce}
