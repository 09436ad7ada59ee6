"""Replace low-rank matrices by small dense ones with the same inner products (Core Space, arXiv 2509.17786)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_frmerge.geometry.lowrank import Factors, stack_factors
from hf_frmerge.geometry.sphere import Array

# Shape suffixes: N = number of low-rank matrices, R = sum of their ranks, m and n = rows and columns of the products,
# P and Q = dimensions of the common column and row spaces (at most R).


@dataclass(frozen=True)
class CoreSpace:
    """
    Small dense matrices ("cores"), one for each low-rank matrix, with the same inner products.

    `U_B` and `V_A` have orthonormal columns, so `M -> U_B @ M @ V_A.T` is an isometry: norms, angles and means of the
    cores agree with those of the full matrices.
    """

    U_B: Array  # (m, P): orthonormal basis of all columns, leading left singular vectors of [B_1 ... B_N]
    V_A: Array | None  # (n, Q): orthonormal basis of all rows, leading right singular vectors of [A_1; ...; A_N]
    cores: Array  # (N, P, Q): x_i = U_B @ cores[i] @ V_A.T; (N, P, n) if there is no V_A, which stands for 1

    def factors(self, core: Array) -> Factors:
        """Map a core back to the low-rank matrix it represents."""
        return Factors(self.U_B, core) if self.V_A is None else Factors(self.U_B @ core, self.V_A.T)


def core_space(factors: Sequence[Factors], *, left_only: bool = False) -> CoreSpace:
    """
    Represent low-rank matrices in the smallest common space of their columns and rows (arXiv 2509.17786).

    Lossless for any ranks: every `x_i` is `U_B @ cores[i] @ V_A.T`.

    Args:
        factors (`Sequence[Factors]`): N pairs `B` `(m, r_i)` and `A` `(r_i, n)` with their scales.
        left_only (`bool`): Whether the cores keep the rows as they are.

    Returns:
        `CoreSpace`: Bases and one core per matrix.

    Raises:
        ValueError: If there is no pair, or the shapes do not fit.
    """
    B_mR, A_Rn, owner_NR = stack_factors(factors)
    # Bases of the stacked factors contain the columns and rows of every matrix, whatever the ranks: nothing is lost.
    U_B = np.linalg.svd(B_mR, full_matrices=False)[0]
    V_A = None if left_only else np.linalg.svd(A_Rn, full_matrices=False)[2].T
    # Both products are shared by all matrices; owner_R picks the ranks of one of them, with its scale.
    left_PR, right_RQ = U_B.T @ B_mR, A_Rn if V_A is None else A_Rn @ V_A
    return CoreSpace(U_B, V_A, np.stack([(left_PR * owner_R) @ right_RQ for owner_R in owner_NR]))
