"""Kernels of the two passes of every merge: Gram matrices and linear combinations over the raw bytes of tensors."""

from __future__ import annotations
