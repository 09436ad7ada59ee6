"""Geometry of a few points: Gram matrices, the unit sphere, the Karcher mean, low-rank factors. NumPy float64 only."""

from __future__ import annotations
