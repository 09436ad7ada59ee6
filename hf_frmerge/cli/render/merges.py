"""Print plans, inspections and merges, and what became of merges that were checked or made again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_frmerge.cli.render.terminal import console, human_bytes, human_count, human_seconds, print_verdicts
from hf_frmerge.merging.planning.account import ModelAccount
from hf_frmerge.wording.account import account_sentence
from hf_frmerge.wording.calibration import WITHOUT_DATA, calibration_verdict
from hf_frmerge.wording.geometry import Geometry, geometry_verdicts
from hf_frmerge.wording.methods import method_of
from hf_frmerge.wording.numbers import number
from hf_frmerge.wording.vocabulary import vocabulary_sentence

if TYPE_CHECKING:
    from hf_frmerge.extraction.extract_lora import ExtractedAdapter
    from hf_frmerge.merging.record.manifest import Manifest
    from hf_frmerge.provenance.merge_again import Reproduction
    from hf_frmerge.provenance.verify import VerifyReport


def print_merge(report: Mapping[str, Any], manifest: Manifest, output_dir: str) -> None:
    """
    Print the summary of a merge.

    Args:
        report (`Mapping[str, Any]`): `FisherRaoMerger.report`.
        manifest (`Manifest`): Record of the merge.
        output_dir (`str`): Folder of the merged model.
    """
    out = console()
    parts = [f"{report['n_merged']} tensors merged ({_manner(report, len(manifest.experts))})"]
    parts += [f"{report[f'n_{what}']} {what}" for what in ("copied", "skipped") if report.get(f"n_{what}")]
    out.print(", ".join(parts) + ".")
    out.print(account_sentence(_accounts(report)))
    if manifest.vocabulary is not None:
        out.print(vocabulary_sentence(manifest.vocabulary))
    out.print(
        f"{human_bytes(report['input_bytes'])} read, {human_bytes(report['output_bytes'])} written in "
        f"{human_seconds(report['seconds'])}: {human_bytes(report['bytes_per_second'])}/s of input "
        f"({report['kernels']} kernels)."
    )
    calibration = manifest.calibration
    fitted = [calibration_verdict(calibration)] if calibration is not None else []
    print_verdicts(out, fitted + geometry_verdicts(Geometry.of_manifest(manifest)))
    if calibration is None and len(manifest.experts) > 1:
        out.print(WITHOUT_DATA)
    out.print(f"Output: {output_dir}", style="bold")
    out.print(f"Check it bit for bit with: frmerge verify {shlex.quote(output_dir)}")


def _manner(facts: Mapping[str, Any], n_experts: int) -> str:
    """Say how tensors are merged; the mean of a single adapter is that adapter."""
    if n_experts == 1 and method_of(facts["method"]).is_directional:
        return "one adapter alone, whose mean is itself"
    return f"{facts['method']}, {facts['space']}, block {facts['block']}"


def print_plan(plan: Mapping[str, Any], output_dir: str) -> None:
    """Print `MergePlan.describe()` with `licences` and `accounts`: models, tensors, sizes, and notes."""
    # Imported on use, as in `print_inspection`: after a merge, which has a summary without tables, it would be waste.
    from rich.table import Table

    from hf_frmerge.merging.planning.vocabulary.record import VocabularyRecord

    out = console()
    table = Table("model", "weight", "kind", "tensors", "size", "licence", "where")
    for column in table.columns[1:5]:
        column.justify = "right"
    for model in [*plan["experts"], *([plan["base"]] if plan["base"] else [])]:
        weight = f"{model['weight']:.4g}" if "weight" in model else "base"
        where = f"Hub, commit {model['commit'][:12]}" if model["commit"] else "local"
        size, licence = human_bytes(model["bytes"]), plan["licences"]["models"].get(model["spec"]) or "not given"
        table.add_row(model["spec"], weight, model["kind"], str(model["n_tensors"]), size, licence, where)
    out.print(table)
    out.print(
        f"{plan['n_merge']} tensors to merge ({_manner(plan, len(plan['experts']))}), "
        f"{plan['n_copy']} to copy; {human_count(plan['n_parameters'])} parameters, dtype {plan['dtype']}."
    )
    out.print(account_sentence(_accounts(plan)))
    if plan["vocabulary"] is not None:
        out.print(vocabulary_sentence(VocabularyRecord.from_dict(plan["vocabulary"])))
    shards = plan["shards"]
    files = shards[0] if len(shards) == 1 else f"{len(shards)} files, {shards[0]} to {shards[-1]}"
    out.print(
        f"{human_bytes(plan['input_bytes'])} to read, {human_bytes(plan['output_bytes'])} to write to {output_dir} "
        f"({files}); {human_bytes(plan['disk_free'])} free there."
    )
    out.print(f"Memory: about {human_bytes(plan['memory_estimate'])} for each worker, beside the interpreter.")
    if plan["download_bytes"]:
        out.print(f"{human_bytes(plan['download_bytes'])} to download from the Hub.")
    for note in [*plan["licences"]["notes"], *plan["notes"]]:
        out.print(f"Note: {note}", style="yellow")


def print_inspection(inspection: Mapping[str, Any], top: int | None) -> None:
    """
    Print the tensors with the largest angles, the whole model, and the verdict.

    Args:
        inspection (`Mapping[str, Any]`): `Inspection.to_dict()`, the `verdict` on it, and `accounts`.
        top (`int` or `None`): Number of tensors to show; `None` shows all.
    """
    from rich.table import Table

    out = console()
    spaces = [space for space in ("weights", "deltas") if inspection["total"].get(space)]
    tensors = sorted(inspection["tensors"], key=lambda row: -row[spaces[-1]]["max_angle"])
    shown = tensors if top is None else tensors[:top]
    table = Table()
    table.add_column("tensor", overflow="fold")
    for space in spaces:
        for column in ("norm", "angle", "gap"):
            table.add_column(f"{space}\n{column}", justify="right")
    for row in [*shown, inspection["total"]]:
        cells = [cell for space in spaces for cell in _view_cells(row[space])]
        table.add_row(row["name"], *cells, end_section=row is shown[-1])
    out.print(table)
    out.print(
        "norm: mean over experts; angle: largest between two of them (rad); gap: from the Karcher mean to the "
        "norm-rescaled average (rad)",
        style="dim",
    )
    if len(shown) < len(tensors):
        out.print(f"{len(shown)} of {len(tensors)} tensors, those with the largest angles; --all shows every one.")
    out.print(account_sentence(_accounts(inspection), "measured", "that a merge copies"))
    out.print(inspection["verdict"], style="bold")
    if "curvature" in inspection:
        _print_curvature(inspection["curvature"], inspection["experts"])


def _print_curvature(curvature: Mapping[str, Any], experts: Sequence[str]) -> None:
    from rich.table import Table

    out = console()
    table = Table()
    table.add_column("linear layers of", overflow="fold")
    for place in range(1, len(experts) + 1):
        table.add_column(f"trace\n{place}", justify="right")
    for column in ("mean costs\n(nats)", "saved\nat best"):
        table.add_column(column, justify="right")
    for block in curvature["blocks"]:
        share = block["eta"] / 2 / block["cost"] if block["cost"] else 0.0
        traces = [f"{trace:.3g}" for trace in block["traces"]]
        table.add_row(block["name"], *traces, f"{block['cost']:.3g}", f"{share:.0%}")
    out.print(table)
    out.print(
        "trace: of the Fisher information of expert 1, 2, ..., how much a prediction depends on these weights; nats: "
        "what a plain mean costs, a prediction; saved: by the best point for these curvatures",
        style="dim",
    )
    out.print(curvature["verdict"], style="bold")


def print_verification(report: VerifyReport, output_dir: str) -> None:
    """Print all problems, then how many tensors and files were checked."""
    out = console()
    for problem in report.problems:
        out.print(problem, style="red")
    checked = f"{report.checked_tensors} tensors recomputed, {report.checked_files} files checked"
    if report.ok:
        out.print(f"{output_dir} is exactly what its experts and its record give: {checked}.", style="green")
    else:
        count = len(report.problems)
        out.print(f"{output_dir}: {count} problem{'s' if count > 1 else ''}; {checked}.", style="bold red")
    if report.without_sha256:
        files = ", ".join(report.without_sha256)
        out.print(f"No SHA-256 was recorded of inputs that are not here as they were merged: {files}.", style="yellow")


def print_reproduction(result: Reproduction, model: str) -> None:
    """Print whether a repeated merge is identical, the first 20 differences, and their possible causes."""
    out = console()
    shown = 20  # a wrong expert makes all tensors differ: hundreds of lines would hide the causes below
    for difference in result.differences[:shown]:
        out.print(difference, style="red")
    if len(result.differences) > shown:
        out.print(f"... and {len(result.differences) - shown} more; --json lists all.", style="red")
    compared = f"{result.n_tensors} tensors and {result.n_files} files compared"
    if result.identical:
        out.print(f"{model} was made again, identical bit for bit: {compared}.", style="green")
    else:
        out.print(f"{model} was made again and is not the same: {compared}.", style="bold red")
    if result.causes:
        out.print("Not as it was then:")
        for cause in result.causes:
            out.print(f"  {cause}")
    if result.output_dir is not None:
        out.print(f"Output: {result.output_dir}", style="bold")


def print_extracted(extracted: ExtractedAdapter) -> None:
    """Print the ranks of an extracted adapter, its error, the worst module, and tensors it leaves out."""
    out = console()
    ranks = [module.rank for module in extracted.modules]
    worst = max(extracted.modules, key=lambda module: module.error)
    out.print(f"{len(ranks)} modules of rank {min(ranks)} to {max(ranks)}; {len(extracted.unchanged)} unchanged.")
    out.print(
        f"The adapter lacks {extracted.error:.2%} of the norm of the difference to the base; worst module: "
        f"{worst.module}, {worst.error:.2%}."
    )
    if extracted.left_out:
        names = sorted(extracted.left_out, key=lambda name: -extracted.left_out[name])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        out.print(f"Not in any chosen module, so left as in the base: {', '.join(names[:3])}{more}.", style="yellow")
    out.print(account_sentence(extracted.accounts, "in the adapter", "equal in both"))
    out.print(f"Output: {extracted.output_dir}", style="bold")


def _accounts(described: Mapping[str, Any]) -> list[ModelAccount]:
    return [ModelAccount.from_dict(each) for each in described["accounts"]]


def _view_cells(view: Mapping[str, Any]) -> list[str]:
    """Format mean norm, largest angle and gap of a tensor in one space."""
    norm = sum(view["norms"]) / len(view["norms"])
    return [number(norm), number(view["max_angle"]), number(view["karcher_nre_gap"])]
