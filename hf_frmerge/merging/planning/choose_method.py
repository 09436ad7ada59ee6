"""Choose the method of a merge with `method="auto"`, by what is known of its experts before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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


def choose_method(
    args: MergingArguments, experts: Sequence[Source], *, has_base: bool
) -> tuple[MergingArguments, str]:
    """
    Choose by the kind of the experts, and return the options and a sentence that says why.

    Deltas of fine-tunes are nearly at right angles, so that their mean is shorter than they are. Of full fine-tunes a
    mean stretched to their length has kept more of them than the plain mean on every set that was measured; of
    adapters on five of six, and much less on the sixth. Neither norms nor angles tell that one from the others, so of
    adapters it is the plain mean (docs/methods.md).

    Args:
        args: Options, of which `method` is to be chosen.
        experts: The experts; only their kind matters.
        has_base: Whether there is a base model, without which full models have no deltas.
    """
    has_adapters = any(source.kind == "adapter" for source in experts)
    if len(experts) == 1:
        chosen, why = Candidate("linear"), "there is one expert"
    elif has_adapters:
        chosen, why = Candidate("linear"), "how far a mean of adapters may be stretched is not known without prompts"
    elif args.space == "weights" or not has_base:
        chosen, why = Candidate("linear"), "of whole weights, not of deltas, all means are nearly the same"
    else:
        chosen, why = Candidate("nre"), "of full fine-tunes a mean as long as they are has kept more than a plain one"
        args = replace(args, space="deltas")
    return chosen.of(args), (
        f"method='auto' is {chosen.label} here: {why}. With prompts (--calibration), the one of "
        f"{', '.join(c.label for c in CANDIDATES)} that is nearest to the experts on them takes its place."
    )


def with_start(args: MergingArguments, label: str) -> MergingArguments:
    """Return the options with the candidate of this label."""
    return next(candidate for candidate in CANDIDATES if candidate.label == label).of(args)
