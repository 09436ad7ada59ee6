"""One sentence on what became of the tensors of all models of a merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hf_frmerge.merging.planning.account import ModelAccount


def account_sentence(accounts: Sequence[ModelAccount]) -> str:
    """Say how many tensors of the models were merged and copied, and how many were not used, and why."""
    total, merged = sum(each.n_tensors for each in accounts), sum(each.n_merged for each in accounts)
    copied = sum(each.n_copied for each in accounts)
    unused: Counter[str] = Counter()
    for each in accounts:
        unused.update(each.unused)
    parts = [f"{merged} merged"] + ([f"{copied} copied"] if copied else [])
    parts += [f"{count} {reason}" for reason, count in sorted(unused.items())]
    return f"Accounted for all {total} tensors of {len(accounts)} models: {', '.join(parts)}."
