"""One tiny family for all tests of searches."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparison_family import Family, save_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
