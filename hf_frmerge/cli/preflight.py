"""`frmerge plan` and `frmerge inspect`: commands to run before a merge."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hf_frmerge.cli.command import FrmergeCommand, results_only
from hf_frmerge.cli.options import (
    CALIBRATION,
    CURVATURE,
    EXPERTS,
    MEAN,
    OUTPUT,
    RUNNING,
    VOCABULARY,
    arguments_from,
    options_from,
)

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan


@click.command("plan", cls=FrmergeCommand)
@click.argument("experts", nargs=-1, metavar="EXPERT EXPERT ... | CONFIG")
@click.option("--config", metavar="FILE", help="YAML or JSON file with options; the command line overrides it.")
@options_from(EXPERTS, VOCABULARY, MEAN, CALIBRATION, OUTPUT, RUNNING)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(experts: tuple[str, ...], config: str | None, as_json: bool, **options: Any) -> None:
    """
    Show what a merge would do, from file headers alone.

    Takes the options of `frmerge merge`, but for those of progress and the Hub, makes all its checks, and neither
    writes nor downloads anything.
    """
    expert_arguments, args = arguments_from(experts, config, options)
    with results_only():
        from hf_frmerge.checkpoints.lock import refuse_while_merging
        from hf_frmerge.merging.arguments.checks import check_calls_for_prompts
        from hf_frmerge.merging.engine.engine import worker_count
        from hf_frmerge.merging.output_folder import check_output_dir
        from hf_frmerge.merging.planning.account import account
        from hf_frmerge.merging.planning.disk_space import check_space, download_bytes
        from hf_frmerge.weighting.plan_merge import plan_merge

        calibration = expert_arguments.calibration_dataset
        has_prompts = calibration is not None
        check_calls_for_prompts(args.method, args.fisher, args.refine_steps, has_prompts=has_prompts)
        refuse_while_merging(args.output_dir)
        merge_plan = plan_merge(
            expert_arguments.experts,
            args,
            expert_arguments.weights,
            expert_arguments.base_model,
            download=False,
            has_prompts=has_prompts,
        )
    with closing(merge_plan):
        # Not for `inspect`, which writes nothing and so accepts any folder.
        check_output_dir(args, merge_plan.input_paths)
        with results_only():
            if calibration is not None:
                merge_plan.notes.append(_fit_note(merge_plan, calibration))
            description = merge_plan.describe() | {
                "licences": _licences(merge_plan),
                "download_bytes": download_bytes(merge_plan),
                "accounts": [asdict(each) for each in account(merge_plan)],
            }
        if as_json:
            click.echo(json.dumps(description, indent=2))
        else:
            from hf_frmerge.cli.render.merges import print_plan

            print_plan(description, args.output_dir)
        worker_count(merge_plan)  # raises if there can be none
        check_space(merge_plan)  # last: the plan shows how much is needed, and should be printed in any case


def _fit_note(merge_plan: MergePlan, calibration: Any) -> str:
    """
    Check that the merge can be fitted to the prompts, and say so; models that are not here yet cannot be asked.

    Raises:
        ArgumentError: If the merge would be refused for its prompts, or its models for being run.
    """
    from hf_frmerge.merging.planning.disk_space import download_bytes

    if download_bytes(merge_plan):
        return "The prompts are read once the models are downloaded; nothing was checked of them here."
    from hf_frmerge.calibration.calibrate import prepare

    prepare(merge_plan, calibration)
    return "Prompts and models were checked: the models can be run on them."


def _licences(merge_plan: MergePlan) -> dict[str, Any]:
    """
    Return the licences in the models' cards, and the licence the merge may have.

    Raises:
        MergeError: If a licence forbids derived works and `allow_license` does not name it.
    """
    from hf_frmerge.hub.card.licences import licences_of_plan

    decision = licences_of_plan(merge_plan)
    decision.raise_if_refused()
    return {
        "models": {spec: metadata.licence for spec, metadata in decision.table},
        "output": decision.licence,
        "notes": [decision.reason, *decision.flags],
    }


@click.command("inspect", cls=FrmergeCommand)
@click.argument("experts", nargs=-1, metavar="EXPERT EXPERT ... | CONFIG")
@click.option("--config", metavar="FILE", help="YAML or JSON file with options; the command line overrides it.")
@options_from(EXPERTS, VOCABULARY, CURVATURE)
@click.option("--all", "show_all", is_flag=True, help="Show every tensor, not only those with the largest angles.")
@click.option("--json", "as_json", is_flag=True, help="Print everything that was measured as JSON.")
def inspect(experts: tuple[str, ...], config: str | None, show_all: bool, as_json: bool, **options: Any) -> None:
    """
    Measure angles and norms: can the choice of method matter here?

    Reads all weights once and writes nothing. With a base model, the differences to it are measured too; with prompts
    (--calibration), how different the curvatures of the experts' predictions are, and what that can be worth.
    """
    with results_only():
        from tqdm import tqdm

        from hf_frmerge.merging.inspection import inspect_experts
        from hf_frmerge.merging.planning.account import account
        from hf_frmerge.weighting.plan_merge import plan_merge
        from hf_frmerge.wording.inspection import inspection_verdict

        expert_arguments, args = arguments_from(experts, config, options)
        with closing(
            plan_merge(
                expert_arguments.experts,
                args,
                expert_arguments.weights,
                expert_arguments.base_model,
                has_prompts=expert_arguments.calibration_dataset is not None,
            )
        ) as merge_plan:
            total = sum(step.nbytes for step in merge_plan.steps if step.action == "merge")
            with tqdm(total=total, desc="Inspecting", unit="B", unit_scale=True) as bar:

                def advance(nbytes: int) -> None:
                    bar.update(nbytes)

                inspection = inspect_experts(merge_plan, progress=advance)
            accounts = [asdict(each) for each in account(merge_plan)]
            curvature = _curvature(merge_plan, expert_arguments.calibration_dataset)
    described = {**inspection.to_dict(), "verdict": inspection_verdict(inspection), "accounts": accounts, **curvature}
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    from hf_frmerge.cli.render.merges import print_inspection

    print_inspection(described, top=None if show_all else 12)


def _curvature(merge_plan: MergePlan, calibration: Any) -> dict[str, Any]:
    """Return the curvature of the experts' predictions and its verdict; nothing without prompts."""
    if calibration is None:
        return {}
    from hf_frmerge.calibration.curvature import measure_curvature
    from hf_frmerge.wording.inspection import curvature_verdict

    measured = measure_curvature(merge_plan, calibration)
    return {"curvature": {**measured.to_dict(), "verdict": curvature_verdict(measured.cost, measured.eta)}}


COMMANDS = {"plan": plan, "inspect": inspect}
