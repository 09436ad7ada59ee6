"""Gram matrices and linear combinations over the raw bytes of tensors: the two passes every merge is made of."""

from __future__ import annotations
