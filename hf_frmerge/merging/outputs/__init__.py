"""Outputs of a merge: the shards of a full model, or the factors of an adapter."""

from __future__ import annotations
