"""What is planned for the tensors of a merge, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.alignment.token_rows import TokenRows
    from hf_frmerge.merging.planning.tensor_step import TensorStep


@dataclass(frozen=True)
class PlannedSteps:
    """
    Steps for all tensors of the output, and what follows from them.

    Attributes:
        steps: one for each tensor of a full model, or for each module of an adapter.
        notes: what the user should know.
        left_out: tensor that the output does not have -> reason.
        config_changes: entries of the output's `config.json` that differ from those of the donor.
        token_rows: rows of embeddings that were matched by token; `None` if they are taken as they are stored.
    """

    steps: list[TensorStep]
    notes: list[str]
    left_out: Mapping[str, str]
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    token_rows: TokenRows | None = None
