"""One tiny family for all tests of comparisons."""

from __future__ import annotations

from comparison_family import cache, family  # noqa: F401  # fixtures
