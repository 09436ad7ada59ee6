"""What a comparison found, in sentences for terminal and page."""

from __future__ import annotations

from hf_frmerge.comparison.record import ComparisonRecord, MethodResult
from hf_frmerge.wording.numbers import decimals, listed, percent


def sentences(record: ComparisonRecord) -> list[str]:
    """Return the result, what cannot be told from it, and what the user should know."""
    best = record.best
    told = [f"{best.label}{_scaled(best)} is best here: it {_does(best, record)}."]
    if record.tied:
        names = listed([f"{row.label}{_scaled(row)}" for row in record.tied])
        told.append(
            f"Not told from it on these texts: {names}. The difference is within the spread; more text may part them."
        )
    edges = [row.label for row in record.methods if row.is_edge]
    if edges:
        told.append(
            f"At the end of the scales that were tried: {listed(edges)}. Other scales may be better for "
            f"{'it' if len(edges) == 1 else 'them'}: --scales (scales)."
        )
    told += [f"No merge by {row.label}: {row.failure}" for row in record.methods if row.failure is not None]
    return told + record.notes


def _does(row: MethodResult, record: ComparisonRecord) -> str:
    if record.unit == "loss":
        return f"loses {decimals(-row.score, 3)} nats on average, ± {decimals(row.error, 3)}"
    worst = min(row.by_place, key=lambda name: row.by_place[name])
    return (
        f"keeps {percent(row.score, 1)} (± {decimals(100 * row.error, 1)}) of the experts' gains on average, and "
        f"{percent(row.by_place[worst], 1)} of {worst}, the least"
    )


def _scaled(row: MethodResult) -> str:
    return "" if row.scale is None else f" × {row.scale:g}"
