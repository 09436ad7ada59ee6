"""Align the modules of several adapters, check that they fit together, and report which adapter lacks which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hf_frmerge.checkpoints.adapters.adapter import Adapter
from hf_frmerge.checkpoints.adapters.factors import LowRankDelta
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import CheckpointError
from hf_frmerge.geometry.lowrank import Factors


@dataclass(frozen=True)
class AdapterRow:
    """Deltas of one module in all adapters; None for an adapter that does not change it."""

    deltas: tuple[LowRankDelta | None, ...]

    @property
    def first(self) -> LowRankDelta:
        """Delta of the first adapter that changes the module; it gives the name and the shapes."""
        return next(delta for delta in self.deltas if delta is not None)

    @property
    def n_out(self) -> int:
        """Rows of `up`."""
        return self.first.up.shape[0]

    @property
    def n_in(self) -> int:
        """Columns of `down`, including the kernel of a convolution."""
        return math.prod(self.first.down.shape[1:])

    def factors(self, only: Sequence[bool] | None = None) -> list[Factors]:
        """Read the factors; an adapter without the module, or for which `only` is False, has factors of rank 0."""
        wanted = only or [True] * len(self.deltas)
        return [
            Factors(*delta.read(), delta.scale) if delta is not None and use else self._no_factors()
            for delta, use in zip(self.deltas, wanted)
        ]

    def digested_factors(self) -> tuple[list[Factors], dict[int, str]]:
        """Read the factors once, and return them with a digest for every adapter that has the module."""
        factors, digests = [], {}
        for index, delta in enumerate(self.deltas):
            if delta is None:
                factors.append(self._no_factors())
            else:
                up, down, digests[index] = delta.read_digested()
                factors.append(Factors(up, down, delta.scale))
        return factors, digests

    def _no_factors(self) -> Factors:
        return Factors(np.zeros((self.n_out, 0)), np.zeros((0, self.n_in)))


def align_adapters(adapters: Sequence[Adapter]) -> list[AdapterRow]:
    """
    Align the modules of all adapters, in the order in which they first appear.

    Raises:
        CheckpointError: If a module has another kind or shape in one adapter than in another.
    """
    targets = list(dict.fromkeys(target for adapter in adapters for target in adapter.deltas))
    rows = [AdapterRow(tuple(adapter.deltas.get(target) for adapter in adapters)) for target in targets]
    for row in rows:
        first = row.first
        expected = (first.kind, row.n_out, first.down.shape[1:])
        for delta in row.deltas:
            if delta is not None and (delta.kind, delta.up.shape[0], delta.down.shape[1:]) != expected:
                names = [d.checkpoint.source.spec for d in (first, delta)]
                raise CheckpointError(
                    f"Module {first.module!r} is a {first.kind} of shape {first.shape} in adapter {names[0]!r} but a "
                    f"{delta.kind} of shape {delta.shape} in {names[1]!r}. They belong to different base models."
                )
    return rows


def missing_notes(
    adapters: Sequence[Adapter], rows: Sequence[AdapterRow], strict: bool, *, is_matched: bool
) -> list[str]:
    """
    Note which adapters do not change which modules.

    Args:
        adapters (`Sequence[Adapter]`):
            The adapters.
        rows (`Sequence[AdapterRow]`):
            What `align_adapters` returned for them.
        strict (`bool`):
            Raise if an adapter lacks a module.
        is_matched (`bool`):
            Whether the names were matched to a base, so that each module has one name.

    Raises:
        CheckpointError: If a module is missing and `strict` is set, or if it seems to be missing only because it has
            another name.
    """
    if not is_matched:
        _refuse_other_names(adapters, rows)
    notes = []
    for index, adapter in enumerate(adapters):
        missing = [row.first.module for row in rows if row.deltas[index] is None]
        if not missing:
            continue
        if strict:
            raise CheckpointError(
                f"Adapter {adapter.spec!r} does not change {some(missing)}, which other adapters change. Without "
                "`strict` these count as zero deltas."
            )
        notes.append(
            f"Adapter {adapter.spec!r} does not change {len(missing)} of {len(rows)} modules ({some(missing)}); they "
            "count as its zero deltas."
        )
    return notes


def _refuse_other_names(adapters: Sequence[Adapter], rows: Sequence[AdapterRow]) -> None:
    """Raise if two adapters each lack a module of the other, and the two modules differ only in their prefix."""
    for (i, one), (j, other) in combinations(enumerate(adapters), 2):
        only_one = {_likeness(row.deltas[i]): row for row in rows if row.deltas[i] and not row.deltas[j]}
        only_other = {_likeness(row.deltas[j]): row for row in rows if row.deltas[j] and not row.deltas[i]}
        alike = next((key for key in only_one if key in only_other), None)
        if alike is not None:
            raise CheckpointError(
                f"Adapter {one.spec!r} names a module {only_one[alike].first.module!r} that {other.spec!r} may name "
                f"{only_other[alike].first.module!r}: classes and versions of transformers name one module "
                "differently. Pass base_model (--base-model), which tells what belongs together."
            )


def _likeness(delta: LowRankDelta | None) -> tuple[object, ...]:
    """Return what a module has in common under all its names: last part, layer, kind and shape."""
    assert delta is not None
    parts = delta.module.split(".")
    layer = tuple(part for part in parts if part.isdigit())
    return parts[-1], layer, delta.kind, delta.up.shape[0], delta.down.shape[1:]
