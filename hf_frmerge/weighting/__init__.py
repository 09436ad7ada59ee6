"""Weights that are not numbers of the user's: from the steps of checkpoints, and from norms."""

from __future__ import annotations
