"""Which tensors of a model, or modules of an adapter, are merged as matrices, and what becomes of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.model_structure import may_be_tied
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.planning.plan import Expert
    from hf_frmerge.merging.planning.tensor_step import TensorStep


def is_inner_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the matrix of a layer: not a vector, a stack of matrices, an embedding or a head."""
    return len(shape) == 2 and min(shape) > 1 and not may_be_tied(name)


def matrix_note(args: MergingArguments, steps: Sequence[TensorStep]) -> str:
    """Say how many tensors are merged as matrices, and what is done with the others."""
    others = [step.name for step in steps if step.action == "merge" and not step.is_matrix]
    n_matrices = sum(step.is_matrix for step in steps)
    if METHODS[args.method].kind != "spectral":
        return (
            f"post_step={args.post_step!r} corrects {n_matrices} matrices of layers. The other {len(others)} tensors "
            f"({some(others)}) stay as method={args.method!r} merges them."
        )
    if not others:
        return f"method={args.method!r} merges all {n_matrices} matrices of the adapters."
    return (
        f"method={args.method!r} merges {n_matrices} matrices of layers. The experts' deltas of the other "
        f"{len(others)} tensors ({some(others)}) are {'added' if METHODS[args.method].is_continual else 'averaged'}: "
        "embeddings, heads, norms, vectors and stacks of matrices."
    )


def refuse_without_factors(args: MergingArguments, experts: Sequence[Expert], steps: Sequence[TensorStep]) -> None:
    """Raise if a method that is defined by factors is to merge a matrix of which an expert has none."""
    if not METHODS[args.method].needs_factors:
        return
    remedy = "Use method='knots', which is like it and takes whole matrices"
    for expert in experts:
        if expert.adapter is None:
            raise ArgumentError(
                f"method={args.method!r} merges the low-rank factors of adapters, and {expert.spec!r} has none. "
                f"{remedy}."
            )
        whole = [s.name for s in steps if s.is_matrix and expert.adapter.is_whole(s.name)]
        if whole:
            raise ArgumentError(
                f"method={args.method!r} merges the low-rank factors of adapters, and adapter {expert.spec!r} has "
                f"none of {some(whole)}, which it changes as a whole (modules_to_save, or DoRA). {remedy}, or leave "
                "these tensors out (leave_out)."
            )
