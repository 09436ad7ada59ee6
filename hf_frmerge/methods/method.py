"""Description of a merge method: its options, what the engine must measure for it, and its texts for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_frmerge.methods.span import SpanMethod
    from hf_frmerge.methods.sparse.rules import SparseOptions

Kind = Literal["span", "sparse", "spectral", "calibrated", "given"]
"""
How the engine runs a method: what the first pass over the inputs measures, and what is decided from that.

    kind        first pass measures            decision                      second pass writes
    span        Gram matrices of differences   coefficients, block x expert  a sum of the experts
    sparse      what the method wants to know  what is kept of each delta    deltas merged element by element
    spectral    nothing                        the method and its numbers    deltas merged matrix by matrix
    calibrated  as linear                      as linear                     the same, and what prompts say to add
    given       nothing                        coefficients from a file      a sum of the experts
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
        """URL of its abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Method:
    """
    Description of one merge method, for the whole package.

    Planning, help, card and report read this; only the engine acts on `kind`.

    Attributes:
        name: value of the `method` option.
        kind: how the engine runs it.
        title: completes "combined by ...".
        how: what it does to one block, in plain words, for someone who never merged a model.
        why: what it is good for, and compared with what.
        options: the arguments it uses beside the weights.
        n_experts: the number of experts it takes; `None` for any number.
        density: default of the option of that name.
        extension: if `n_experts` is set, the method to use for other numbers.
        needs_deltas: whether it is defined on differences to a base model.
        adds: whether it adds up what the experts learned, each times its weight, rather than averaging: weights are
            factors, 1 by default, and a negative one subtracts.
        is_isotropic: whether all directions of a merged matrix, or an adapter's in it, are equally strong, so that
            none can be told apart.
        cores: where deltas in other orthonormal coordinates give the merged delta in these, so that low-rank ones are
            merged as small matrices, and can become an adapter: in the coordinates of both sides, or of the outputs.
        has_fixed_coefficients: whether its coefficients are the weights, whatever the experts are.
        needs_factors: whether it is defined by the factors of low-rank deltas, so that only adapters can be merged.
        is_continual: whether it adds the last expert to the first, which may be a merge; its scale is measured.
        is_directional: whether it chooses a direction and takes its norm from the options `norm` and `beta`.
        is_spherical: whether its direction can differ from that of the plain mean.
        is_iterative: whether it stops at a tolerance, so that steps and residual must be reported.
        fits_adapter: whether what a calibrated method adds to a mean of adapters is of so low a rank as they are.
        is_compared: whether a comparison of methods tries it unless it is told which to try.
        blocks: the block sizes it supports; by default all.
        paper: where it was published.
        tags: tags of the merged model on the Hub.
    """

    name: str
    kind: Kind
    title: str
    how: str
    why: str
    options: tuple[str, ...] = ()
    n_experts: int | None = None
    extension: str | None = None
    density: float | None = None
    needs_deltas: bool = False
    adds: bool = False
    is_isotropic: bool = False
    cores: Literal["both", "left"] | None = None
    has_fixed_coefficients: bool = False
    needs_factors: bool = False
    is_continual: bool = False
    is_directional: bool = False
    is_spherical: bool = False
    is_iterative: bool = False
    fits_adapter: bool = False
    is_compared: bool = False
    blocks: tuple[str, ...] = ("tensor", "row", "head", "layer", "model")
    paper: Paper | None = None
    tags: tuple[str, ...] = ()

    @property
    def needs_prompts(self) -> bool:
        """Whether it asks what the experts do on prompts, which must be passed."""
        return self.kind == "calibrated"

    @property
    def is_geometric(self) -> bool:
        """Whether its coefficients follow from lengths and angles of the experts."""
        return self.kind == "span" and not self.has_fixed_coefficients

    def solver(self) -> SpanMethod:
        """
        Return the function of a span method: the one in `methods/span.py` that has its name.

        A calibrated method has that of `linear`: what the prompts say is added to the plain average.

        The import is inside because `--help` and the arguments read the table of methods, and importing numpy would
        cost them a tenth of a second.
        """
        from hf_frmerge.methods import span

        function: SpanMethod = vars(span)["linear" if self.needs_prompts else self.name]
        return function

    def rule(self) -> Callable[[SparseOptions], Any]:
        """Return the function of a sparse method: the one in `methods/sparse/rules.py` that has its name."""
        from hf_frmerge.methods.sparse import rules

        function: Callable[[SparseOptions], Any] = vars(rules)[self.name]
        return function
