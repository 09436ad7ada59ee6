"""What a comparison of merge methods found, in sentences for terminal and page."""

from __future__ import annotations

from collections.abc import Mapping

from hf_frmerge.evaluation.comparison_record import ComparisonRecord, MethodResult
from hf_frmerge.wording.numbers import decimals, listed, percent
from hf_frmerge.wording.parts import Part
from hf_frmerge.wording.verdicts import Verdict, graded

TIED = "*"
"""Mark of methods that cannot be told from the best."""

FIGURES = {
    "ranking": Part(
        "Which merge is best, and by how much",
        "A point is the mean over the test texts, its line the 95% interval over texts drawn again. In the second "
        "part the same texts are drawn for both, so that it can tell methods apart whose lines in the first overlap: "
        "where the line reaches 0 the two are tied. ◂ is further behind than is drawn.",
    ),
    "experts": Part(
        "What every merge keeps of each expert",
        "On that expert's own text, with 95% intervals over texts drawn again. 0% is as good as the base, 100% as "
        "good as the expert.",
    ),
    "trade_off": Part(
        "The mean against the expert that loses most",
        "Best is the upper right corner. On the dashed line all experts keep the same share; the further a method is "
        "below it, the more it takes from one of them.",
    ),
    "scales": Part(
        "Score against the scale",
        "On the validation texts, on which the scale was chosen (filled). A curve that still rises at an end could be "
        "better beyond.",
    ),
    "cost": Part(
        "What a merge takes",
        "Time of one merge in memory, with the fit if there was one, and the most memory it may hold beside the "
        "model. The first of the span methods measures for all of them.",
    ),
}
"""Name of a figure of a comparison -> its title and explanation."""

EXPERTS_OF_LOSSES = Part(
    "Loss on every text",
    "In nats a token, or a label; lower is better. Lines are 95% intervals over texts drawn again.",
)
"""In place of `experts`, where there is no base whose loss is known."""


def figure_part(record: ComparisonRecord, name: str) -> Part:
    """Return title and explanation of a figure."""
    return EXPERTS_OF_LOSSES if name == "experts" and record.unit == "loss" else FIGURES[name]


def score_heading(record: ComparisonRecord) -> str:
    """Say what the scores are, and on how much text."""
    title = "Share of each expert's gain that is kept" if record.unit == "share" else "Loss in nats, lower is better"
    n_predictions, n_texts = (
        sum(count[what] for count in record.texts["test"].values()) for what in ("predictions", "texts")
    )
    return f"{title}, on {n_predictions:,} predictions in {n_texts:,} texts"


def named(row: MethodResult) -> str:
    """Name a method with the scale that was chosen."""
    return row.label + ("" if row.scale is None else f" × {row.scale:g}")


def command_heading(record: ComparisonRecord) -> str:
    """Say what the command of a comparison makes."""
    if record.best.model is None:
        return "The command that makes the best merge"
    first = next(row for row in record.methods if row.model is None)
    return f"The best is there already: {record.best.model}. The command that makes {named(first)}, the next"


def score(record: ComparisonRecord, value: float) -> str:
    """Format a score: a share as "82.4%", minus a loss as the loss."""
    return percent(value, 1) if record.unit == "share" else decimals(-value, 3)


def difference(record: ComparisonRecord, value: float) -> str:
    """Format a difference of scores: in points of a hundred, or in nats."""
    return decimals(100 * value, 1) if record.unit == "share" else decimals(value, 3)


def comparison_verdicts(record: ComparisonRecord) -> list[Verdict]:
    """Return the result, what cannot be told from it, what is told from it, and what the user should know."""
    best = record.best
    level = graded(best.score, 0.8, 0.4) if record.unit == "share" else "fact"
    found = [Verdict(level, f"Best here: {named(best)}", f"{named(best)} is best here: it {_does(record)}.")]
    if record.tied:
        names = listed([named(row) for row in record.tied])
        found.append(
            Verdict(
                "fact",
                f"Tied with it: {len(record.tied)}",
                f"Not told from it on these texts: {names}. The difference is within the spread; more text may part "
                "them.",
            )
        )
    others = [row for row in record.methods if not row.is_tied]
    if others:
        found.append(Verdict("fact", f"Behind it: {len(others)}", _behind(record, others)))
    return [*found, *_warnings(record), *(Verdict("fact", "Note", note) for note in record.notes)]


def _does(record: ComparisonRecord) -> str:
    best = record.best
    if record.unit == "loss":
        return f"loses {score(record, best.score)} nats on average, ± {difference(record, best.error)}"
    return share_kept(best.score, best.error, best.by_place)


def share_kept(share: float, error: float, by_expert: Mapping[str, float]) -> str:
    """Say how much of the experts' gains a merge keeps on average, and of which one least."""
    worst = min(by_expert, key=lambda name: by_expert[name])
    return (
        f"keeps {percent(share, 1)} (± {decimals(100 * error, 1)}) of the experts' gains on average, and "
        f"{percent(by_expert[worst], 1)} of {worst}, the least"
    )


def _behind(record: ComparisonRecord, others: list[MethodResult]) -> str:
    """Say how far the best is ahead of the next that can be told from it, and of the last."""
    unit = "points" if record.unit == "share" else "nats"
    first, last = others[0], others[-1]
    low, high = (difference(record, end) for end in first.lead_interval)
    text = f"{named(first)} is {difference(record, first.lead)} {unit} behind the best (95%: {low} to {high})"
    return text + (f", {named(last)}, the last, {difference(record, last.lead)}." if len(others) > 1 else ".")


def _warnings(record: ComparisonRecord) -> list[Verdict]:
    found = []
    edges = [row.label for row in record.methods if row.is_edge]
    if edges:
        found.append(
            Verdict(
                "watch",
                "At the end of the scales",
                f"At the end of the scales that were tried: {listed(edges)}. Other scales may be better for "
                f"{'it' if len(edges) == 1 else 'them'}: --scales (scales).",
            )
        )
    for row in record.methods:
        if row.seed_scores:
            low, high = score(record, min(row.seed_scores)), score(record, max(row.seed_scores))
            found.append(
                Verdict(
                    "fact",
                    f"{row.label}: {len(row.seed_scores)} seeds",
                    f"{row.label} draws at random: with {len(row.seed_scores)} seeds it has {low} to {high}, and the "
                    "mean counts.",
                )
            )
    found += [
        Verdict("watch", f"No merge by {label}", f"No merge by {label}: {why}") for label, why in record.failed.items()
    ]
    return found
