"""Bring the tensors of several checkpoints together: names, ties, classes, tokens."""

from __future__ import annotations
