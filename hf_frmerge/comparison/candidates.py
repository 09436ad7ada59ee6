"""What is compared: methods with their options, and the scales and weights that each of them is tried with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.values import did_you_mean
from hf_frmerge.methods.table import METHODS

SCALES = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Factors of the merged delta that every method is tried with."""

# Beside the options of its own that a method has.
_OF_ALL = ("space", "block", "post_step", "svc_floor", "layer_scales")


@dataclass(frozen=True)
class Candidate:
    """
    A method and its options, whatever the scale and the weights of the experts.

    Attributes:
        method: name of the method.
        options: arguments of a merge that are not left at their defaults, by name, as text.
    """

    method: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Name in tables: `ties`, or `ties density=0.3`."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options)])


@dataclass(frozen=True)
class Cell:
    """
    One merge of a comparison.

    Attributes:
        candidate: the method.
        scale: factor of the merged delta; `None` in weight space, where there is none.
        weights: of the experts; `None` if they are all alike.
        fit: digest of the prompts it is fitted to its experts on, and of how; `None` without a fit.
        model: folder or Hub id of a merge that is there already, which is compared as it is; its candidate is its name
            and the digest of its content. `None` for a merge that is made here.
    """

    candidate: Candidate
    scale: float | None
    weights: tuple[float, ...] | None
    fit: str | None = None
    model: str | None = None

    @property
    def label(self) -> str:
        """Name in tables, whatever the scale and the weights."""
        if self.model is not None:
            return f"{self.candidate.method} (as it is)"
        return self.candidate.label + (", fitted" if self.fit is not None else "")

    @property
    def is_refined(self) -> bool:
        """Whether a refinement that is asked for goes on from it: from the fit, not from methods that need prompts."""
        return self.fit is not None and not METHODS[self.candidate.method].needs_prompts

    @property
    def key(self) -> str:
        """What it is known by in the file of finished cells."""
        fit = [] if self.fit is None else [self.fit]
        return json.dumps([self.candidate.method, self.candidate.options, self.scale, self.weights, *fit])


def parse_candidate(text: str) -> Candidate:
    """
    Read a method with options: `ties`, `ties,density=0.3`, `karcher,space=weights,block=row`.

    Raises:
        ArgumentError: If there is no such method, or it has no such option.
    """
    name, *settings = text.split(",")
    if name not in _comparable():
        raise ArgumentError(
            f"There is no method {name!r} to compare: expected one of {', '.join(_comparable())}."
            + did_you_mean(name, _comparable())
        )
    known = (*METHODS[name].options, *_OF_ALL)
    options = []
    for setting in settings:
        option, separator, value = setting.partition("=")
        if not separator or option not in known or option == "scale":
            raise ArgumentError(
                f"{text!r}: expected NAME or NAME,option=value with an option of {name} "
                f"({', '.join(one for one in known if one != 'scale')}), but got {setting!r}. All methods are tried "
                "with the same scales (--scales)."
            )
        options.append((option, value))
    return Candidate(name, tuple(options))


def default_candidates(n_experts: int, *, has_base: bool) -> list[Candidate]:
    """
    Return the methods that are compared if none are named: those that can run on these experts.

    Args:
        n_experts: Number of experts.
        has_base: Whether there is a base model, without which there are no deltas.
    """
    return [
        Candidate(method.name)
        for method in METHODS.values()
        if method.is_compared and method.n_experts in (None, n_experts) and (has_base or not method.needs_deltas)
    ]


def cells_of(
    candidate: Candidate, scales: Sequence[float], weights: Sequence[tuple[float, ...] | None], *, has_base: bool
) -> list[Cell]:
    """Return the merges that a candidate is tried with: every scale with every choice of weights."""
    in_deltas = has_base and dict(candidate.options).get("space") != "weights"
    factors: Sequence[float | None] = scales if in_deltas else (None,)
    return [Cell(candidate, scale, chosen) for chosen in weights for scale in factors]


def with_seeds(cell: Cell, n_seeds: int, seed: int) -> list[Cell]:
    """
    Return a merge, and if its method draws at random the same with the seeds that follow its own.

    Args:
        cell: The merge.
        n_seeds: Number of seeds.
        seed: Of a merge that has none among its options.
    """
    candidate = cell.candidate
    if cell.model is not None or "seed" not in METHODS[candidate.method].options:
        return [cell]
    options = dict(candidate.options)
    first = int(options.pop("seed", seed))
    others = [Candidate(candidate.method, (*options.items(), ("seed", str(first + n)))) for n in range(1, n_seeds)]
    return [cell, *(replace(cell, candidate=other) for other in others)]


def arguments_of(cell: Cell) -> dict[str, Any]:
    """Return the arguments of a merge that a cell decides, by name; `space` is deltas where there is a scale."""
    arguments: dict[str, Any] = {"method": cell.candidate.method}
    if cell.scale is not None:
        arguments |= {"space": "deltas", "scale": cell.scale}
    return arguments | dict(cell.candidate.options)


def _comparable() -> list[str]:
    return [method.name for method in METHODS.values() if method.kind != "given"]
