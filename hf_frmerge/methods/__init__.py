"""Merging methods. `span`: those whose answer is a combination of the experts, found from a Gram matrix alone."""

from __future__ import annotations
