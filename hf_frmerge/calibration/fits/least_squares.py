"""
Fit linear layers of a merge to what the experts' layers give, in closed form.

Sequential least squares with expert targets. For a group of linear layers that share an input, with the input X of
the merge so far and X_i^e of expert i on the same prompts, the target of expert i is

    T_i = rho X_i^e W_i^T + (1 - rho) X_i W_i^T  [+ r (h_i^e - h_i) for layers that write to the residual stream h]

and the fitted weight is the ridge solution around a start W_s

    W = W_s + [(G + lambda mu I + sum_i P_i)^-1 (R + sum_i P_i (W_i - W_s)^T)]^T
    G = sum_i alpha_i X_i^T D X_i,   R = sum_i alpha_i X_i^T D (T_i - X_i W_s^T),   mu = mean(diag G)

where D holds weights of tokens, and P_i = mu k_i C_i a prior (see `UpdatePrior`).
"""

# Shape suffixes: T = tokens, I = inputs of a layer (one more with a bias), O = outputs, K = rank.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_frmerge.errors import NonFiniteError

# Keeps the Cholesky decomposition stable where inputs are linearly dependent, relative to the mean square of an input.
_JITTER = 1e-9

# Of a symmetric product one strip after the other is computed, each from the diagonal on. With 8 of them 576 inputs
# take 3.9 ms instead of 6.5, and 1,536 take 27 instead of 45 (900 tokens); with 16 no less.
_STRIPS = 8

# Squared norm of an adapter's update, relative to the weight, from which on the pull along it weakens. Those of real
# adapters are 1e-5 to 4e-3; where they are as large as the weights the pull made fits worse than none did.
_LARGE = 1e-2


@dataclass(frozen=True)
class FitOptions:
    """
    Settings of a fit.

    Attributes:
        ridge: lambda, the pull to the start, relative to the mean square of an input.
        expert_inputs: rho, the share of the targets that is computed from the experts' own inputs: 1 asks the layer to
            undo the drift of its inputs, 0 takes the drift as it is.
        residual: r, the share of the drift of the residual stream to undo in a layer that writes to it.
        update_prior: kappa, the pull to each full fine-tune along its own update.
        adapter_prior: the same of adapters.
    """

    ridge: float = 0.03
    expert_inputs: float = 0.5
    residual: float = 0.25
    update_prior: float = 0.0
    adapter_prior: float = 0.0


@dataclass
class Moments:
    """
    Second moments of one expert's prompts at the input of a group of layers, summed over tokens, float32.

    Attributes:
        merged_II: `X^T X` of the merge's own inputs; complete once the moments are part of a system.
        cross_II: `X^T X^e`, with the expert's inputs.
        n_tokens: number of tokens; where several processes share prompts, of all of them.
    """

    merged_II: Tensor
    cross_II: Tensor
    n_tokens: int = 0

    @staticmethod
    def zeros(n_in: int, device: torch.device) -> Moments:
        """Return moments of no tokens."""
        return Moments(*torch.zeros(2, n_in, n_in, device=device))

    def add(self, merged_TI: Tensor, expert_TI: Tensor) -> None:
        """Add some tokens."""
        _add_upper(self.merged_II, merged_TI, merged_TI)
        self.cross_II.addmm_(merged_TI.T, expert_TI)
        self.n_tokens += len(merged_TI)

    def pull_IO(self, expert_OI: Tensor, options: FitOptions) -> Tensor:
        """Return `X^T T`, with the targets of a layer of the group; in float32, as precise as the moments are."""
        return torch.lerp(self.merged_II, self.cross_II, options.expert_inputs) @ expert_OI.T

    def without_bias(self) -> Moments:
        """Return the moments without the last input, the constant 1 of a bias."""
        return Moments(self.merged_II[:-1, :-1], self.cross_II[:-1, :-1], self.n_tokens)


@dataclass
class WriterMoments:
    """
    The same of a layer that writes to the residual stream: tokens have weights D, and targets the stream's drift.

    It is one layer with many inputs and few outputs, so that its targets, token by token, take less time and memory
    than the moments of its inputs do.

    Attributes:
        merged_II: `X^T D X`; complete once the moments are part of a system.
        target_IO: `X^T D T`.
        n_tokens: as of `Moments`.
    """

    merged_II: Tensor
    target_IO: Tensor
    n_tokens: int = 0

    @staticmethod
    def zeros(n_in: int, n_out: int, device: torch.device) -> WriterMoments:
        """Return moments of no tokens; `n_out` is the width of the residual stream."""
        return WriterMoments(torch.zeros(n_in, n_in, device=device), torch.zeros(n_in, n_out, device=device))

    def add(
        self,
        merged_TI: Tensor,
        expert_TI: Tensor,
        weights_T: Tensor,
        drift_TO: Tensor,
        expert_OI: Tensor,
        options: FitOptions,
    ) -> None:
        """Add some tokens; `drift_TO` is how far the stream before the layer is from the expert's, `h^e - h`."""
        weighted_TI = merged_TI * weights_T[:, None]
        _add_upper(self.merged_II, weighted_TI, merged_TI)
        target_TO = torch.lerp(merged_TI, expert_TI, options.expert_inputs) @ expert_OI.T
        self.target_IO.addmm_(weighted_TI.T, target_TO.add_(drift_TO, alpha=options.residual))
        self.n_tokens += len(merged_TI)

    def pull_IO(self, expert_OI: Tensor, options: FitOptions) -> Tensor:
        """Return `X^T D T`."""
        return self.target_IO


def _add_upper(gram_II: Tensor, left_TI: Tensor, right_TI: Tensor) -> None:
    """Add `left^T right`, which is symmetric, to what is on and above the diagonal: six tenths of the work."""
    width = -(-gram_II.shape[0] // _STRIPS)
    for start in range(0, gram_II.shape[0], width):
        gram_II[start : start + width, start:].addmm_(left_TI[:, start : start + width].T, right_TI[:, start:])


def _mirror(gram_II: Tensor) -> None:
    """Copy what is above the diagonal to below it."""
    width = -(-gram_II.shape[0] // _STRIPS)
    for start in range(0, gram_II.shape[0], width):
        strip = gram_II[start : start + width, start:]
        square = strip[:, : strip.shape[0]]
        square.copy_(square.triu() + square.triu(1).T)
        gram_II[start + width :, start : start + width] = strip[:, strip.shape[0] :].T


@dataclass
class System:
    """
    Normal equations of one layer, without ridge and start: `gram W^T = pull`; float32.

    Filled one expert after the other, so that the moments of one expert alone are in memory.

    Attributes:
        gram_II: `sum_i alpha_i X_i^T D X_i`.
        pull_IO: `sum_i alpha_i X_i^T D T_i`.
    """

    gram_II: Tensor
    pull_IO: Tensor

    @staticmethod
    def zeros(n_in: int, n_out: int, device: torch.device) -> System:
        """Return equations of no tokens."""
        return System(torch.zeros(n_in, n_in, device=device), torch.zeros(n_in, n_out, device=device))

    def add(self, moments: Moments | WriterMoments, share: float, expert_OI: Tensor, options: FitOptions) -> None:
        """Add an expert with its weight `share`; one without prompts adds nothing."""
        if not moments.n_tokens:
            return
        _mirror(moments.merged_II)
        factor = share / moments.n_tokens
        self.gram_II.add_(moments.merged_II, alpha=factor)
        self.pull_IO.add_(moments.pull_IO(expert_OI, options), alpha=factor)


@dataclass
class UpdatePrior:
    """
    What the experts' updates say without prompts, float32.

    Gradients are sums of outer products with the inputs, so the update D_i of a layer spans the inputs that it was
    trained on: its Gram matrix `C_i = D_i^T D_i`, scaled to a mean diagonal of 1, stands in for theirs. That of an
    adapter spans what it reads: along these few directions nobody but this expert changed the layer.

    Attributes:
        base_OI: weight of the base.
        gram_II: `sum_i k_i C_i`, with k_i = kappa times the expert's share.
        pull_IO: `sum_i k_i C_i D_i^T`.
    """

    base_OI: Tensor
    gram_II: Tensor
    pull_IO: Tensor

    @staticmethod
    def zeros(base_OI: Tensor) -> UpdatePrior:
        """Return what no expert says."""
        n_out, n_in = base_OI.shape
        return UpdatePrior(base_OI, base_OI.new_zeros(n_in, n_in), base_OI.new_zeros(n_in, n_out))

    def add(self, delta_OI: Tensor, strength: float) -> None:
        """Add the update of a full fine-tune; one of zeros counts for nothing."""
        self._add(delta_OI.T @ delta_OI, delta_OI.T, strength)

    def add_factors(self, up_OK: Tensor, down_KI: Tensor, strength: float) -> None:
        """Add the update of an adapter, `up @ down`; the larger it is against the weight, the less it counts."""
        own_II = down_KI.T @ (up_OK.T @ up_OK) @ down_KI
        relative = own_II.trace() / self.base_OI.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        self._add(own_II, down_KI.T @ up_OK.T, strength / (1 + float(relative) / _LARGE))

    def _add(self, own_II: Tensor, delta_IO: Tensor, strength: float) -> None:
        if (mean := own_II.diagonal().mean()) > 0:
            own_II *= strength / mean
            self.gram_II += own_II
            self.pull_IO += own_II @ delta_IO

    def merge(self, ridge: float) -> Tensor:
        """
        Return the merge without prompts, `W_0 + (sum_i k_i D_i C_i) (sum_i k_i C_i + ridge I)^-1`.

        The closed form that WUDI-Merging (arXiv 2503.08099) descends to, with a ridge to the base in place of early
        stopping: every expert counts along the inputs that its update spans.
        """
        solved_IO = _solve(_factor(self.gram_II, ridge), self.pull_IO)
        return self.base_OI + solved_IO.T.to(self.base_OI.dtype)


@dataclass(frozen=True)
class Fit:
    """
    Solved layer.

    Attributes:
        weight_OI: fitted weight, float64.
        metric_II: lower Cholesky factor of the system, for `low_rank`; float64.
        system_II: the system, with ridge and prior, float32.
    """

    weight_OI: Tensor
    metric_II: Tensor
    system_II: Tensor


def fit_linear(
    system: System, start_OI: Tensor, options: FitOptions, *, has_bias: bool, prior: UpdatePrior | None = None
) -> Fit:
    """
    Fit one layer.

    Args:
        system: Equations of all experts; changed in place.
        start_OI: Start, with the bias as a last column if `has_bias`; float32.
        options: Settings.
        has_bias: Whether the last input is the constant 1 of a bias; it has a ridge of its own.
        prior: Of the weight without the bias.

    Raises:
        NonFiniteError: If an activation is not finite.
    """
    system_II, pull_IO = system.gram_II, system.pull_IO
    pull_IO -= system_II @ start_OI.T
    diagonal_I = system_II.diagonal()
    if not diagonal_I.isfinite().all() or not pull_IO.isfinite().all():
        raise NonFiniteError("activations of the merge are not finite")
    n_in = len(diagonal_I) - has_bias
    mean = float(diagonal_I[:n_in].mean()) or 1.0  # all inputs zero: the ridge alone decides, and keeps the start
    ridge_I = torch.full_like(diagonal_I, (options.ridge + _JITTER) * mean)
    if has_bias:
        ridge_I[-1] = (options.ridge + _JITTER) * (float(diagonal_I[-1]) or 1.0)
    system_II.diagonal().add_(ridge_I)
    if prior is not None:
        system_II[:n_in, :n_in] += mean * prior.gram_II
        # sum_i k_i C_i (W_i - W_s)^T, with W_i = W_0 + D_i.
        to_start_IO = prior.gram_II @ (prior.base_OI - start_OI[:, :n_in]).T
        pull_IO[:n_in] += mean * (prior.pull_IO + to_start_IO)
    metric_II = _factor(system_II)
    return Fit(_solve(metric_II, pull_IO).T.add_(start_OI), metric_II, system_II)


def _factor(system_II: Tensor, ridge: float = 0.0) -> Tensor:
    """Return the lower Cholesky factor of a symmetric matrix, in one float64 copy of it."""
    columns_II = system_II.to(torch.float64, copy=True).mT  # as LAPACK stores them: in other orders they are copied
    columns_II.diagonal().add_(ridge)
    return torch.linalg.cholesky(columns_II, out=columns_II)


def _solve(factor_II: Tensor, pull_IO: Tensor) -> Tensor:
    """Return the float64 solution of `factor factor^T x = pull`; `cholesky_solve` would copy the factor."""
    solved_IO = pull_IO.to(torch.float64, copy=True)
    torch.linalg.solve_triangular(factor_II, solved_IO, upper=False, out=solved_IO)
    return torch.linalg.solve_triangular(factor_II.mT, solved_IO, upper=True, out=solved_IO)


def low_rank(correction_OI: Tensor, metric_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """
    Return the factors `(O, K)` and `(K, I)` of the best approximation of a correction by a rank.

    Best in the metric of the layer's inputs, `|| (M - M_k) L ||` with `L L^T` the system of the fit: reduced-rank
    regression, which spends the rank on what the inputs can see.
    """
    metric_II = metric_II.float()  # the factors are kept in half precision at most
    seen_IO = metric_II.T @ correction_OI.float().T
    # Eigenvectors of the smaller Gram matrix: a full SVD costs several times as much.
    if seen_IO.shape[0] <= seen_IO.shape[1]:
        _, vectors = torch.linalg.eigh(seen_IO @ seen_IO.T)
        left_IK = vectors[:, -rank:].flip(1)
        right_KO = left_IK.T @ seen_IO
    else:
        _, vectors = torch.linalg.eigh(seen_IO.T @ seen_IO)
        right = vectors[:, -rank:].flip(1)
        left_IK, right_KO = seen_IO @ right, right.T
    down_IK = torch.linalg.solve_triangular(metric_II.T, left_IK, upper=True)
    return right_KO.T.contiguous(), down_IK.T.contiguous()
