"""How far to go from the model so far to one that was trained on: P&M's coefficient (arXiv 2505.22389)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# A curvature along the step this much smaller than its squared length says nothing about where to stop.
_LEAST_CURVATURE = 1e-30


@dataclass
class TaskLosses:
    r"""
    Losses of all tasks so far, to second order: \(\sum_i (\theta - \theta^*_i)^T F_i (\theta - \theta^*_i)\).

    With diagonal \(F_i\) two sums hold all of it, \(S = \sum_i F_i\) and \(T = \sum_i F_i \theta^*_i\), so memory does
    not grow with the number of tasks. They are float32 tensors, as large as the parameters, to be saved with
    `torch.save` and given back at construction.

    Attributes:
        n_tasks: number of tasks.
        curvature: S, by name of the parameter.
        pull: T.

    Example:

    ```python
    >>> import torch
    >>> losses, merged = TaskLosses(), {"w": torch.zeros(1)}
    >>> for trained in (1.0, 2.0, 6.0):
    ...     losses.add({"w": torch.tensor([trained])}, {"w": torch.ones(1)})
    ...     alpha = losses.coefficient(merged, {"w": torch.tensor([trained])})
    ...     merged["w"] = merged["w"] + alpha * (trained - merged["w"])
    >>> round(float(merged["w"]), 6)  # equal curvatures: the mean of 1, 2 and 6
    3.0

    ```
    """

    n_tasks: int = 0
    curvature: dict[str, Tensor] = field(default_factory=dict)
    pull: dict[str, Tensor] = field(default_factory=dict)

    def add(self, trained: Mapping[str, Tensor], fisher: Mapping[str, Tensor]) -> None:
        """
        Add a task.

        Args:
            trained: Parameters at its end, by name.
            fisher: Diagonal of the Fisher information there, of the same names and shapes; not negative.
        """
        for name, values in fisher.items():
            share = values.float()
            weighted = share * trained[name].float()
            self.curvature[name] = self.curvature[name] + share if name in self.curvature else share
            self.pull[name] = self.pull[name] + weighted if name in self.pull else weighted
        self.n_tasks += 1

    def coefficient(self, previous: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> float:
        r"""
        Return the \(\alpha\) in [0, 1] for which \(\hat\theta + \alpha\Delta\) has the least loss over all tasks.

        \[ \alpha = -\frac{(S\hat\theta - T)^T \Delta}{\Delta^T S \Delta}, \quad \Delta = \theta^* - \hat\theta \]

        The merge is then the plain mean of `previous` and `trained` with weights \(1 - \alpha\) and \(\alpha\). Where
        the curvature along the step is zero, it is 1 over the number of tasks, the plain mean of all.

        Args:
            previous: Merged model before the task, \(\hat\theta\).
            trained: Model that was trained from it, \(\theta^*\); its task was added before.
        """
        slope = bend = length = 0.0
        for name, curvature in self.curvature.items():
            origin, step = previous[name].double(), trained[name].double() - previous[name].double()
            slope += float(((curvature.double() * origin - self.pull[name].double()) * step).sum())
            bend += float((curvature.double() * step * step).sum())
            length += float((step * step).sum())
        if bend <= _LEAST_CURVATURE * length:
            return 1.0 / max(self.n_tasks, 1)
        return min(max(-slope / bend, 0.0), 1.0)
