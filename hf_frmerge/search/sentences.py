"""What a search for weights found, in sentences."""

from __future__ import annotations

from hf_frmerge.search.record import Chosen, SearchRecord
from hf_frmerge.wording.comparison import share_kept
from hf_frmerge.wording.numbers import decimals, listed

TRUSTED_FIT = 0.8
"""R² on merges left out below which a surrogate is said to be a guess."""

ALIKE = "all alike"
"""Name of the merge with equal weights, beside which every other is measured."""


def sentences(record: SearchRecord) -> list[str]:
    """Return the result, what cannot be told from it, how far the surrogates can be trusted, and the notes."""
    best = record.chosen[0]
    told = [f"{_capital(best.label)}: {_does(best, record)}."]
    tied = [row for row in record.chosen[1:] if row.is_tied]
    if tied:
        told.append(f"Not told from it on these texts: {listed([row.label for row in tied])}.")
    alike = next((row for row in record.chosen if ALIKE in row.names), None)
    if alike is not None and alike.is_tied:
        told.append("So these texts do not tell that any weights are better than equal ones.")
    unsure = {task: fit for task, fit in record.fit.items() if fit is None or fit < TRUSTED_FIT}
    if unsure:
        how_well = listed([f"{task} {decimals(fit, 2)}" for task, fit in unsure.items()])
        told.append(
            f"The front is a guess: on merges left out of the fit its surrogates have an R² of {how_well}. Measure "
            "more merges (evaluations, --evaluations), on more text (max_tokens, --max-tokens), or with a narrower "
            "range of scales (scales, --scales)."
        )
    return told + record.notes


def _does(row: Chosen, record: SearchRecord) -> str:
    if record.unit == "loss":
        return f"a loss of {decimals(-row.score, 3)} nats on average, ± {decimals(row.error, 3)}"
    return share_kept(row.score, row.error, row.by_place)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
