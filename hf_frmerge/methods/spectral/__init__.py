"""
Methods that merge a matrix as a whole, by its singular vectors or the products of its rows.

A spectral method is a function `(experts, weights, options) -> merged delta` on the deltas of one matrix; `decision`
lists them, `methods.table` describes them. Matrices are float32 unless a function says otherwise; what NumPy asks
LAPACK for is computed in float64 and rounded, and its last digits are those of the machine. With `w` the weights, a
sum over the experts is that of `N w_i delta_i`: with equal weights every delta is added once.

Shape suffixes in this room: N = experts, m = rows (outputs), n = columns (inputs), r = rank.
"""

from __future__ import annotations
