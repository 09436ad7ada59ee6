"""Choose the weights of the experts by measuring merges: greedy soups, and Pareto fronts."""

from __future__ import annotations
