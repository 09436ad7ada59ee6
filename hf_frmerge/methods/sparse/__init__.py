"""
Methods that decide about every element of the experts' deltas by itself.

A sparse method is a function of `methods.sparse.rules` that says what to measure of a group of tensors; when that is
measured it returns the decision, an `Elementwise`, which says what of each delta is kept and how it is joined. The
arithmetic on the elements is in `kernels.elementwise`.
"""

from __future__ import annotations
