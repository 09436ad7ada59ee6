"""One tiny family for all tests of searches."""

from __future__ import annotations

from comparison_family import cache, family  # noqa: F401  # fixtures
