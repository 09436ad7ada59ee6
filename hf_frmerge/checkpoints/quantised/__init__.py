"""Quantised checkpoints, read as the plain numbers their codes stand for."""

from __future__ import annotations
