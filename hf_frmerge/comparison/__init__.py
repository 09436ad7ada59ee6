"""Comparison of merge methods on the same experts and texts, without writing the merged models."""

from __future__ import annotations
