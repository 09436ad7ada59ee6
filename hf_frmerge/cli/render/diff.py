"""Human-readable output of `frmerge diff`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hf_frmerge.cli.render.terminal import console

if TYPE_CHECKING:
    from rich.console import Console

    from hf_frmerge.provenance.diff import Change, MergeDiff

_SHOWN = 5


def print_diff(diff: MergeDiff, a: str, b: str) -> None:
    """Print the differences, causes first, then whether the models are identical."""
    out = console()
    for title, changes in (
        ("Sources", diff.sources),
        ("Arguments", diff.arguments),
        ("Versions and machine (need not change the result)", diff.running),
        ("Evaluation of the merged model", diff.evaluation),
    ):
        if changes:
            _print_changes(out, title, changes, a, b)
    if diff.coefficients is not None:
        worst = diff.coefficients
        out.print(
            f"Coefficients differ in {diff.n_coefficients} tensors, most in {worst.tensor!r}, block {worst.block}: "
            f"{worst.expert} has {worst.a:.6g} and {worst.b:.6g}."
        )
    if diff.n_thresholds:
        out.print(f"Thresholds differ in {diff.n_thresholds} tensors.")
    for names, where in ((diff.only_a, a), (diff.only_b, b)):
        if names:
            out.print(f"Only in {where}: {_some(names)}.")
    if diff.files:
        out.print(f"Files that differ: {_some([change.what for change in diff.files])}.")
    if diff.same_model:
        out.print(f"The same model, bit for bit: {diff.n_tensors} tensors.", style="bold green")
    elif diff.different_tensors:
        count = f"{len(diff.different_tensors)} of {diff.n_tensors} tensors differ"
        out.print(f"{count}: {_some(diff.different_tensors)}.", style="bold red")
    else:
        out.print(f"All {diff.n_tensors} tensors of both are the same, but not all of the model.", style="bold red")


def _print_changes(out: Console, title: str, changes: Sequence[Change], a: str, b: str) -> None:
    is_measured = title.startswith("Evaluation")
    table = Table("", a, b, *(["change"] if is_measured else []))
    for change in changes:
        # Only scores are numbers whose difference has a meaning.
        gap = [f"{change.b - change.a:+.4g}" if None not in (change.a, change.b) else ""] if is_measured else []
        table.add_row(change.what, _text(change.a), _text(change.b), *gap)
    out.print(title, style="bold")
    out.print(table)


def _text(value: Any) -> str:
    """Format a value for a cell; commits and checksums are cut to 12 digits."""
    if value is None:
        return "–"
    if isinstance(value, list):
        return "; ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text[:12] if len(text) in (40, 64) and " " not in text else text  # SHA-1 and SHA-256 in hex


def _some(names: Sequence[str]) -> str:
    """List the first few names, and the number of the rest."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
