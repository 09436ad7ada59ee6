"""Experts of a mixture, which checkpoints store one by one and models have in one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_frmerge.checkpoints.names.model_names import ModelNames, Shape, StackedRows, StackRun


@dataclass(frozen=True)
class _Stack:
    """A parameter that is joined of rows of other tensors."""

    shape: Shape
    runs: Sequence[StackRun]

    @property
    def is_of_matrices(self) -> bool:
        """Whether whole matrices of one height are stacked, one or more at each place of its first dimension."""
        (first, height), *others = {(run.first, run.n_rows) for run in self.runs}
        return len(self.shape) == 3 and not others and first == 0 and self.shape[1] % height == 0


class Stacks:
    """
    Parameters of a model's blocks that are joined of several stored tensors.

    Args:
        model: The model.
        blocks: Names of its blocks.
        names: Names of its tensors; `None` if there is no table of these, and so nothing to join.
        stored: Tensors of a checkpoint.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], names: ModelNames | None, stored: Mapping[str, Shape]
    ) -> None:
        self._whole: dict[str, _Stack] = {}  # by the name of the parameter
        self._within: dict[str, _Stack] = {}  # by that within its block, with the parts named so, too
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for parameter, stored_runs in (names.stack(stored) if names is not None else {}).items():
            prefix = next((f"{block}." for block in blocks if parameter.startswith(f"{block}.")), None)
            if names is None or prefix is None or parameter not in shapes:
                continue
            runs = [run._replace(name=names.rename(run.name)) for run in stored_runs]
            within = [run._replace(name=run.name.removeprefix(prefix)) for run in runs]
            self._whole[parameter] = _Stack(shapes[parameter], runs)
            self._within[parameter.removeprefix(prefix)] = _Stack(shapes[parameter], within)

    def parts_of(self, block: str, parameter: str) -> list[str]:
        """Return the tensors, named within the block, of which a parameter is joined: most are alone."""
        if f"{block}.{parameter}" not in self._whole:
            return [parameter]
        return list(dict.fromkeys(run.name for run in self._within[parameter].runs))

    def matrices(self, block: str, parameter: str) -> list[str]:
        """
        Return the matrices, named within the block, that a parameter of three dimensions stacks, one after the other.

        There are none if it is stored as it is, or is made of parts of them.
        """
        stack = self._within.get(parameter) if f"{block}.{parameter}" in self._whole else None
        return [run.name for run in stack.runs] if stack is not None and stack.is_of_matrices else []

    def rows(self) -> dict[str, StackedRows]:
        """Return matrix that is stored by itself -> where it is in a parameter that stacks such matrices."""
        found = {}
        for parameter, stack in self._whole.items():
            for number, run in enumerate(stack.runs if stack.is_of_matrices else ()):
                place, first = divmod(number * run.n_rows, stack.shape[1])
                found[run.name] = StackedRows(parameter, place, first, run.n_rows)
        return found

    def join(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights, of a block or of the model, with the parameters of which they have all parts."""
        joined = dict(weights)
        for stacks in (self._within, self._whole):
            for name, stack in stacks.items():
                if not all(run.name in joined for run in stack.runs):
                    continue
                parts = [joined[r.name].flatten(0, -2)[r.first : r.first + r.n_rows] for r in stack.runs]
                joined[name] = torch.cat(parts).reshape(stack.shape)
                for run in stack.runs:
                    joined.pop(run.name, None)
        return joined
