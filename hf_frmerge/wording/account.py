"""One sentence on what became of the tensors of all models of a merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hf_frmerge.merging.planning.account import ModelAccount


def account_sentence(accounts: Sequence[ModelAccount], merged_are: str = "merged", copied_are: str = "copied") -> str:
    """
    Say how many tensors of the models were merged and copied, and how many were not used, and why.

    Args:
        accounts (`Sequence[ModelAccount]`): One for each model.
        merged_are, copied_are (`str`): What became of them, if it is not a merge that is told of.
    """
    total, merged = sum(each.n_tensors for each in accounts), sum(each.n_merged for each in accounts)
    copied = sum(each.n_copied for each in accounts)
    unused: Counter[str] = Counter()
    for each in accounts:
        unused.update(each.unused)
    parts = [f"{merged} {merged_are}"] + ([f"{copied} {copied_are}"] if copied else [])
    parts += [f"{count} {reason}" for reason, count in sorted(unused.items())]
    return f"Accounted for all {total} tensors of {len(accounts)} models: {', '.join(parts)}."


def losses_sentence(accounts: Sequence[ModelAccount]) -> str | None:
    """Return `account_sentence` if the output lacks something that a model has; None if it does not."""
    return account_sentence(accounts) if any(each.has_losses for each in accounts) else None
