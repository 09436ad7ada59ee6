"""What a merge method is: what it needs, what it decides, and how people speak of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hf_frmerge.methods.span import SpanMethod

Kind = Literal["span", "sparse", "given"]
"""
How the engine carries a method out: what the first pass over the inputs measures, and what is decided from it.

    kind    measures                                  decides                      applies it
    span    Gram matrices of differences              coefficients, block x expert a sum of the experts
    sparse  how often which magnitude of a delta is   a threshold for each expert  element by element
    given   nothing                                   coefficients from a file     a sum of the experts
"""


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        """Address of its abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Method:
    """
    One merge method, described once for the whole package.

    Planning, help, card and report read this; only the engine acts on `kind`.

    Attributes:
        name: as an option names it.
        kind: how the engine carries it out.
        title: fits "combined by ...".
        how: what it does to one block, in plain words, for someone who never merged a model.
        why: what it is good for, and against what.
        options: the arguments it obeys beside the weights.
        n_experts: how many experts it takes, if not any number.
        extension: the method that takes any number, where `n_experts` is set.
        needs_deltas: whether its points are differences to a base model by definition.
        is_directional: whether it chooses a direction and gives it a norm by policy (`norm`, `beta`).
        is_spherical: whether its direction can differ from that of the plain mean.
        is_iterative: whether it stops at a tolerance, so that it has to be said how near it came.
        blocks: what one block may cover; by default anything.
        paper: where it comes from.
        tags: what a model on the Hub is tagged with.
    """

    name: str
    kind: Kind
    title: str
    how: str
    why: str
    options: tuple[str, ...] = ()
    n_experts: int | None = None
    extension: str | None = None
    needs_deltas: bool = False
    is_directional: bool = False
    is_spherical: bool = False
    is_iterative: bool = False
    blocks: tuple[str, ...] = ("tensor", "row", "head", "layer", "model")
    paper: Paper | None = None
    tags: tuple[str, ...] = ()

    def solver(self) -> SpanMethod:
        """
        Return the function of a span method: the one of its name in `methods/span.py`.

        Imported only now: help and arguments read the table of methods, and numpy takes a tenth of a second.
        """
        from hf_frmerge.methods import span

        found: SpanMethod = vars(span)[self.name]
        return found
