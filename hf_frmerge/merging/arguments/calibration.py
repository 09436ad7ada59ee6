"""Which prompts belong to which expert, as a command line or a configuration file says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.values import did_you_mean

SELF = "self"
"""In place of a file: every expert writes its own prompts. A file of this name is `./self`."""

SELF_CHAT = "self:chat"
"""The same, as a user of a chat writes: behind what the chat template puts before a first message."""

SELF_WRITTEN = (SELF, SELF_CHAT)

FIT_OPTIONS = (
    "num_calibration_samples",
    "max_calibration_length",
    "calibration_batch_size",
    "calibration_form",
    "calibration_rank",
)
"""Arguments of a merge that matter only if there are prompts."""

REFINE_OPTIONS = (
    "refine_steps",
    "refine_loss",
    "refine_teacher",
    "refine_lmbda",
    "refine_written_samples",
    "refine_learning_rate",
    "refine_beta",
    "refine_rho",
)
"""Arguments of a merge that matter only if it is fitted to its experts, and the fit refined."""


def parse_calibration(items: Sequence[str], experts: Sequence[str]) -> Mapping[str, str] | str:
    """
    Parse `["org/math=math.jsonl", "org/code=code.jsonl"]`, one file for all experts, or `["self"]`, `["self:chat"]`.

    Args:
        items (`Sequence[str]`): `EXPERT=FILE` for one expert or more, or a single `FILE`, or `self`, `self:chat`.
        experts (`Sequence[str]`): The experts as the user wrote them.

    Returns:
        Expert -> file, or the file for all, or `"self"` or `"self:chat"`.

    Raises:
        ArgumentError: If an expert is unknown or named twice, or a file for all stands beside others.
    """
    by_expert: dict[str, str] = {}
    for item in items:
        # Paths of experts and of files may hold "=", so the names of the experts come first.
        expert = max((name for name in experts if item.startswith(f"{name}=")), key=len, default=None)
        if expert is None and ("=" not in item or Path(item).is_file()):
            if len(items) > 1:
                raise ArgumentError(
                    f"`calibration` has {item!r}, which is for all experts, beside {len(items) - 1} more. Give one "
                    "for all experts, or write EXPERT=FILE for each."
                )
            return item
        if expert is None:
            name = item.partition("=")[0]
            raise ArgumentError(
                f"`calibration` names {name!r}, which is none of the experts {', '.join(map(repr, experts))}. Write "
                f"an expert exactly as in the list of experts.{did_you_mean(name, experts)}"
            )
        file = item[len(expert) + 1 :]
        if expert in by_expert:
            raise ArgumentError(
                f"`calibration` has two files for {expert!r}, {by_expert[expert]!r} and {file!r}. Put the prompts of "
                "an expert into one file."
            )
        by_expert[expert] = file
    return by_expert
