"""`frmerge merge`, and `frmerge add` for one more expert."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import click

from hf_frmerge.cli.command import FrmergeCommand, results_only
from hf_frmerge.cli.options import (
    CALIBRATION,
    EXPERTS,
    HUB,
    MEAN,
    OUTPUT,
    PROGRESS,
    RUNNING,
    VOCABULARY,
    arguments_from,
    options_from,
)
from hf_frmerge.merging.arguments.calibration import parse_calibration

if TYPE_CHECKING:
    from hf_frmerge.merger import FisherRaoMerger


@click.command(
    "merge",
    cls=FrmergeCommand,
    on_interrupt="The output folder holds no finished model. Run the same command with --resume to go on.",
)
@click.argument("experts", nargs=-1, metavar="EXPERT EXPERT ... | CONFIG")
@click.option("--config", metavar="FILE", help="YAML or JSON file with options; the command line overrides it.")
@options_from(EXPERTS, VOCABULARY, MEAN, CALIBRATION, OUTPUT, RUNNING, PROGRESS, HUB)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def merge(experts: tuple[str, ...], config: str | None, as_json: bool, **options: Any) -> None:
    """
    Merge two or more experts into one model.

    An EXPERT is a local folder or a Hub id (org/name or org/name@revision), a full checkpoint or a LoRA adapter. In
    place of the experts a CONFIG file (.yml, .yaml, .json) can hold everything. A single adapter is folded into its
    --base-model.
    """
    # Imported modules are never garbage, but by default Python scans them every 700 new objects: 5 % of a short merge.
    gc.set_threshold(50_000)
    # Before the imports, so that a wrong option is reported at once.
    expert_arguments, args = arguments_from(experts, config, options)
    with results_only():
        from hf_frmerge.merger import FisherRaoMerger

        merger = FisherRaoMerger(
            expert_arguments.experts,
            args=args,
            weights=expert_arguments.weights,
            base_model=expert_arguments.base_model,
            calibration_dataset=expert_arguments.calibration_dataset,
        ).merge()
    _print(merger, as_json)


@click.command(
    "add",
    cls=FrmergeCommand,
    on_interrupt="The output folder holds no finished model. Run the same command with --resume to go on.",
)
@click.argument("merged")
@click.argument("expert")
@options_from({"What is merged": ("method", "base_model")}, CALIBRATION, OUTPUT, RUNNING, PROGRESS, HUB)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def add(
    merged: str, expert: str, base_model: str | None, calibration: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """
    Merge one more EXPERT into MERGED, the folder or Hub id of a merge.

    MERGED counts as often as its record says that it has experts, so that in the end all count alike. Method, base
    model and options are those of its record; a merge by opcm goes on with opcm, others with a recursive mean. A merge
    that was fitted to prompts needs some again (--calibration) to be so.
    """
    prompts = parse_calibration(calibration, [merged, expert]) if calibration else None
    changes = {name: value for name, value in options.items() if value is not None}
    with results_only():
        from hf_frmerge.merger import FisherRaoMerger
        from hf_frmerge.weighting.continual import next_merge

        args, base_model = next_merge(
            merged, changes, base_model, options["hub_token"], has_prompts=prompts is not None
        )
        merger = FisherRaoMerger([merged, expert], args, "continual", base_model, calibration_dataset=prompts).merge()
    _print(merger, as_json)


def _print(merger: FisherRaoMerger, as_json: bool) -> None:
    """Print what came of a merge."""
    if as_json:
        click.echo(json.dumps(merger.report, indent=2))
        return
    from hf_frmerge.cli.render.merges import print_merge
    from hf_frmerge.merging.record.manifest import read_manifest

    folder = merger.args.output_dir
    # A process that did not write the record, of several, reads it.
    print_merge(merger.report, merger.manifest or read_manifest(folder), folder)


COMMANDS = {"merge": merge, "add": add}
