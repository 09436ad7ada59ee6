"""Models that the refinements of this folder are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.refinement_models import save_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder
