"""Tiny models are merged as large ones are: in several batches."""

from __future__ import annotations

import pytest

from hf_frmerge.merging.engine import batches


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_TENSORS", 3)
