"""Callbacks for `transformers.Trainer`: merges that belong to a training run."""

from __future__ import annotations
