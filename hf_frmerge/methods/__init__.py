"""Merge methods. `table` lists them, `span` has the linear combinations, `sparse` the elementwise ones (TIES)."""

from __future__ import annotations
