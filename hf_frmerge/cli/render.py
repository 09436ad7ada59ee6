"""Human-readable output of the commands: tables, units, and sentences about the numbers."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_frmerge.wording.geometry import Geometry, geometry_verdicts
from hf_frmerge.wording.metrics import METRICS
from hf_frmerge.wording.numbers import number, percent
from hf_frmerge.wording.verdicts import Verdict

if TYPE_CHECKING:
    from hf_frmerge.evaluation.record import Recovered, Score
    from hf_frmerge.extraction.extract_lora import ExtractedAdapter
    from hf_frmerge.provenance.merge_again import Reproduction
    from hf_frmerge.provenance.verify import VerifyReport

_TIE = math.log(1.01)  # a few thousand tokens cannot resolve perplexities that differ by less than 1%
_STYLES = {"good": "", "fact": "", "watch": "yellow", "bad": "yellow"}


def console() -> Console:
    """Return a console on stdout. Markup is off, since names and paths may contain brackets; pipes are 120 wide."""
    # Rich assumes 80 columns for a pipe, in which tables would be folded.
    width = None if sys.stdout.isatty() else 120
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=False, width=width)


def human_bytes(count: float) -> str:
    """Format bytes with powers of 1000: `269_000_000` as "269 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # larger counts would be rounded to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def human_count(count: float) -> str:
    """Format a count with powers of 1000: `134_515_008` as "135 M"."""
    for unit in ("", " k", " M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} B"


def human_seconds(seconds: float) -> str:
    """Format a duration: `75` as "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def print_merge(report: Mapping[str, Any], geometry: Geometry, output_dir: str) -> None:
    """
    Print the summary of a merge.

    Args:
        report (`Mapping[str, Any]`): `FisherRaoMerger.report`.
        geometry (`Geometry`): Angles and norms of the merge.
        output_dir (`str`): Folder of the merged model.
    """
    out = console()
    parts = [f"{report['n_merged']} tensors merged ({report['method']}, {report['space']}, block {report['block']})"]
    parts += [f"{report[f'n_{what}']} {what}" for what in ("copied", "skipped") if report.get(f"n_{what}")]
    out.print(", ".join(parts) + ".")
    out.print(
        f"{human_bytes(report['input_bytes'])} read, {human_bytes(report['output_bytes'])} written in "
        f"{human_seconds(report['seconds'])}: {human_bytes(report['bytes_per_second'])}/s of input "
        f"({report['kernels']} kernels)."
    )
    print_verdicts(out, geometry_verdicts(geometry))
    out.print(f"Output: {output_dir}", style="bold")
    out.print(f"Check it bit for bit with: frmerge verify {shlex.quote(output_dir)}")


def print_verdicts(out: Console, verdicts: Iterable[Verdict]) -> None:
    """Print verdicts, one per line; those that need attention in yellow."""
    for verdict in verdicts:
        out.print(verdict.text, style=_STYLES[verdict.level])


def print_plan(plan: Mapping[str, Any], output_dir: str) -> None:
    """Print `MergePlan.describe()` with `licences`: models, tensors to merge and copy, sizes, and notes."""
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
        f"{plan['n_merge']} tensors to merge ({plan['method']}, {plan['space']}, block {plan['block']}), "
        f"{plan['n_copy']} to copy; {human_count(plan['n_parameters'])} parameters, dtype {plan['dtype']}."
    )
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
    Print `Inspection.to_dict()`: the tensors with the largest angles, the whole model, and the verdict.

    Args:
        inspection (`Mapping[str, Any]`): Measurements.
        top (`int` or `None`): Number of tensors to show; `None` shows all.
    """
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
    out.print(inspection["verdict"], style="bold")


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
    out.print(f"Output: {extracted.output_dir}", style="bold")


def print_scores(scores: Sequence[Score], merged: Sequence[str], title: str = METRICS["perplexity"].heading) -> None:
    """
    Print perplexities, a row per model and a column per domain; the last column is the geometric mean.

    Args:
        scores (`Sequence[Score]`): One per model and domain.
        merged (`Sequence[str]`): Names of the merged models; the best in each column are marked.
        title (`str`, *optional*): Title of the table.
    """
    losses = _losses(scores)
    domains = list(dict.fromkeys(score.domain for score in scores))
    has_mean, has_rivals = len(domains) > 1, len(merged) > 1
    rows = {
        name: [*by_domain.values(), *([math.fsum(by_domain.values()) / len(domains)] if has_mean else [])]
        for name, by_domain in losses.items()
    }
    # The experts are left out: each is bound to win on its own text.
    best = [min(column) for column in zip(*(rows[name] for name in merged))]
    table = Table("model")
    for column in [*domains, *(["mean"] if has_mean else [])]:
        table.add_column(column, justify="right")
    for name in sorted(
        rows, key=lambda name: name in merged
    ):  # merges last; the sort is stable, so the rest keep their order
        marks = [has_rivals and name in merged and loss < lowest + _TIE for loss, lowest in zip(rows[name], best)]
        is_last_source = name not in merged and table.row_count + 1 == len(rows) - len(merged)
        cells = [_perplexity(loss, mark) for loss, mark in zip(rows[name], marks)]
        table.add_row(name, *cells, end_section=is_last_source)
    legend = [
        *(["mean: geometric mean"] if has_mean else []),
        *(["* best merge, and those within 1% of it"] if has_rivals else []),
    ]
    n_tokens = sum({score.domain: score.n_tokens for score in scores}.values())
    out = console()
    out.print(f"{title}, {n_tokens:,} tokens", style="bold")
    out.print(table)
    if legend:
        out.print("; ".join(legend), style="dim")


def print_recovery(rows: Iterable[Recovered]) -> None:
    """Print how much of each expert's gain over the base the merged models keep: in nats per token, and as a share."""
    rows = list(rows)
    experts = list(dict.fromkeys((row.expert, row.domain) for row in rows))
    table = Table("model")
    for expert, domain in experts:
        table.add_column(expert if expert == domain else f"{expert} (on {domain})", justify="right")
    gains = {row.expert: row.gain for row in rows}
    table.add_row("the expert itself", *(f"{gains[expert]:+.3f}" for expert, _ in experts), end_section=True)
    for model in dict.fromkeys(row.model for row in rows):
        by_expert = {row.expert: row for row in rows if row.model == model}
        table.add_row(model, *(_kept(by_expert[expert]) for expert, _ in experts))
    out = console()
    out.print("Gain over the base on each expert's text, in nats a token (share of the expert's gain)", style="bold")
    out.print(table)


def _view_cells(view: Mapping[str, Any]) -> list[str]:
    """Format mean norm, largest angle and gap of a tensor in one space."""
    norm = sum(view["norms"]) / len(view["norms"])
    return [number(norm), number(view["max_angle"]), number(view["karcher_nre_gap"])]


def _losses(scores: Iterable[Score]) -> dict[str, dict[str, float]]:
    """Arrange losses as model -> domain -> loss, in nats per token."""
    losses: dict[str, dict[str, float]] = {}
    for score in scores:
        losses.setdefault(score.model, {})[score.domain] = score.metrics["loss"]
    return losses


def _perplexity(loss: float, is_best: bool) -> Text:
    text = METRICS["perplexity"].written(math.exp(min(loss, 700)))  # math.exp raises OverflowError above 709
    return Text(f"{text} *" if is_best else f"{text}  ", style="bold green" if is_best else "")


def _kept(row: Recovered) -> str:
    share = "" if row.share is None else f" ({percent(row.share)})"
    return f"{row.kept:+.3f}{share}"
