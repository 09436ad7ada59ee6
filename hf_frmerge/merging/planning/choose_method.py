"""Choose the method of a merge with `method="auto"`, by what is known of its experts before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_frmerge.methods.entries.auto import AUTO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.checkpoints.resolve import Source
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments


@dataclass(frozen=True)
class Candidate:
    """A method and its exponent on the norm."""

    method: str
    beta: float = 0.0

    @property
    def label(self) -> str:
        """Its name for people, and in the record."""
        return f"{self.method} beta={self.beta:g}" if self.beta else self.method

    def of(self, args: MergingArguments) -> MergingArguments:
        """Return the options with this method."""
        return replace(args, method=self.method, beta=self.beta)


CANDIDATES = (Candidate("linear"), Candidate("nre", 0.5), Candidate("nre"), Candidate("karcher"))
"""What prompts choose among. All are sums of the experts, so a plan for one of them serves the others as well."""

BY_MATRICES = Candidate("swudi")
"""What has kept most of full fine-tunes without data; it takes whole matrices at a time."""


def choose_method(
    args: MergingArguments,
    experts: Sequence[Source],
    *,
    has_base: bool,
    has_prompts: bool,
    too_large: str | None = None,
) -> tuple[MergingArguments, str]:
    """
    Choose by the kind of the experts, and return the options and a sentence that says why.

    Deltas of fine-tunes are nearly at right angles, so that their mean is shorter than they are. Of full fine-tunes a
    mean stretched to their length has kept more of them than the plain mean on every set that was measured, and
    `swudi` more than that. Of adapters `swudi` makes something far too long, and the stretched mean has kept more on
    five sets of six, but much less on the sixth. Neither norms nor angles tell that one from the others, so of
    adapters it is the plain mean (docs/methods.md).

    Args:
        args: Options, of which `method` is to be chosen.
        experts: The experts; only their kind matters.
        has_base: Whether there is a base model, without which full models have no deltas.
        has_prompts: Whether prompts will choose among `CANDIDATES`, for which the plan must be.
        too_large: Says which matrix does not fit into the memory budget, if `BY_MATRICES` was tried.
    """
    has_adapters = any(source.kind == "adapter" for source in experts)
    if len(experts) == 1:
        chosen, why = Candidate("linear"), "there is one expert"
    elif has_adapters:
        chosen, why = Candidate("linear"), "how far a mean of adapters may be stretched is not known without prompts"
    elif args.space == "weights" or not has_base:
        chosen, why = Candidate("linear"), "of whole weights, not of deltas, all means are nearly the same"
    else:
        args = replace(args, space="deltas")
        if has_prompts or too_large or not _takes_matrices(args):
            chosen, why = (
                Candidate("nre"),
                "of full fine-tunes a mean as long as they are has kept more than a plain one",
            )
        else:
            chosen, why = BY_MATRICES, "of full fine-tunes it has kept more than any mean"
    larger = f" {BY_MATRICES.label} has kept more still, but it {too_large}" if too_large else ""
    return chosen.of(args), (
        f"method='auto' is {chosen.label} here: {why}.{larger} With prompts (--calibration), the one of "
        f"{', '.join(c.label for c in CANDIDATES)} that is nearest to the experts on them takes its place."
    )


def _takes_matrices(args: MergingArguments) -> bool:
    """Whether the options are those that `BY_MATRICES` was measured with; it has no norm to choose, nor blocks."""
    return all(getattr(args, name) == getattr(type(args), name) for name in (*AUTO.options, "block"))


def with_start(args: MergingArguments, label: str) -> MergingArguments:
    """Return the options with the candidate of this label."""
    return next(candidate for candidate in CANDIDATES if candidate.label == label).of(args)
