"""Account for every tensor of every model of a merge: merged, copied, or not used, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.adapters.base_copies import copied_from_base
from hf_frmerge.checkpoints.adapters.folded import folded_within
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import Expert, MergePlan

ELSEWHERE = "that gave way to another model's"
NOT_NEEDED = "of the base, which is not part of a merge in weight space"
NOT_HELD = "of the base, which a merged adapter does not hold"
REPEATED = "copies of base tensors beside an adapter"
OF_CODES = "scales of activations or of positions, which plain weights do not need"
SKIPPED = "skipped by a callback"


@dataclass(frozen=True)
class ModelAccount:
    """
    What became of the tensors of one model. All tensors but those in `unused` are merged or copied.

    Attributes:
        n_tensors: tensors that it stores.
        n_merged: those that went into a mean.
        n_copied: those that the output has as they are.
        unused: reason -> number of tensors.
    """

    n_tensors: int
    n_merged: int
    n_copied: int
    unused: dict[str, int] = field(default_factory=dict)

    @property
    def has_losses(self) -> bool:
        """Whether a tensor is not used for another reason than that its values come from elsewhere, as they should."""
        return bool(self.unused.keys() - {ELSEWHERE, NOT_NEEDED, NOT_HELD, REPEATED})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelAccount:
        """Read it from JSON values."""
        return cls(values["n_tensors"], values["n_merged"], values["n_copied"], dict(values["unused"]))


def account(plan: MergePlan, skipped: Collection[str] = ()) -> tuple[ModelAccount, ...]:
    """
    Account for the tensors of every model of a plan, in the order of `plan.models`.

    Args:
        plan: Plan of the merge.
        skipped: Names of tensors that a callback had copied instead of merged.

    Returns:
        `tuple[ModelAccount, ...]`: One for each model.

    Raises:
        CheckpointError: If a tensor is neither used nor left out for a reason: its values would be lost.
    """
    accounts = []
    for index, model in enumerate(plan.models):
        place = index if index < len(plan.experts) else -1
        fates = _fates(plan, model, place, set(skipped))
        lost = [name for name, fate in fates.items() if fate is None]
        if lost:
            raise CheckpointError(
                f"{model.spec!r}: {some(lost)} would be neither merged nor copied. Please report this, with the names "
                "of the models; a merge without these tensors would lose what they hold."
            )
        counts = Counter(fates.values())
        unused = {str(fate): count for fate, count in counts.items() if fate not in ("merge", "copy")}
        accounts.append(ModelAccount(len(fates), counts["merge"], counts["copy"], unused))
    return tuple(accounts)


def _fates(plan: MergePlan, model: Expert, place: int, skipped: set[str]) -> dict[str, str | None]:
    """Return what becomes of every stored tensor of a model: "merge", "copy" or a reason; None if nothing does."""
    targets = _targets(model)
    if place < 0 and plan.output_kind == "adapter":
        return dict.fromkeys(targets, NOT_HELD)
    steps = {step.name: plan.copied(step) if step.name in skipped else step for step in plan.steps}
    reads_base = plan.space == "deltas" or any(expert.adapter for expert in plan.experts)
    fates: dict[str, str | None] = {}
    for name, target in targets.items():
        step = steps.get(target)
        if target in (REPEATED, OF_CODES):
            fates[name] = target
        elif step is None:
            fates[name] = plan.left_out.get(target)
        elif step.action == "merge":
            fates[name] = "merge" if place >= 0 or reads_base else NOT_NEEDED
        elif step.donor == place:
            fates[name] = "copy"
        else:
            fates[name] = SKIPPED if target in skipped else ELSEWHERE
    return fates


def _targets(model: Expert) -> dict[str, str]:
    """Return the tensor of the output that every stored tensor belongs to."""
    if model.checkpoint is not None:
        aliases, logical = model.checkpoint.aliases, model.checkpoint.tensors
        targets = {part.name: name for name, info in logical.items() if name not in aliases for part in info.stored}
        return targets | dict.fromkeys(model.checkpoint.unused, OF_CODES) | _targets_of_folded(model)
    adapter = model.adapter
    assert adapter is not None
    targets = dict.fromkeys(adapter.checkpoint.tensors, "")
    for target, delta in adapter.deltas.items():
        targets |= {part.name: target for part in delta.stored}
    targets |= {info.name: target for target, info in adapter.dense.items()} | dict(adapter.set_apart)
    # PEFT's copies of the base's own weights, those of tied layers, which `base_layers` leaves out, among them.
    return targets | {name: REPEATED for name in adapter.checkpoint.tensors if copied_from_base(name)}


def _targets_of_folded(model: Expert) -> dict[str, str]:
    """Return the tensor of the output that every tensor of an adapter belongs to that a full model is read with."""
    if model.folded is None or model.checkpoint is None:
        return {}
    # Alignment may have renamed the model's tensors since, or made stacks of them.
    names = {
        recipe.info.name: name
        for name, info in model.checkpoint.tensors.items()
        for recipe in folded_within(info)
        if name not in model.checkpoint.aliases
    }
    return {
        part: REPEATED if part in model.folded.base_copies else names.get(target, target)
        for part, target in model.folded.targets.items()
    }
