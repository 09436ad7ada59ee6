"""MAP (arXiv 2406.07529): Pareto fronts of weights from few measured merges, by quadratic surrogates."""

from __future__ import annotations
