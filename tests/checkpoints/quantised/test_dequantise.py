"""What is said where the package that dequantises is missing, and how computed tensors are kept."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_frmerge.checkpoints.quantised.dequantise import EXTRA, dequantise
from hf_frmerge.checkpoints.quantised.recent import Recent
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.errors import CheckpointError

STORED: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "fp8": (
        {"quant_method": "fp8"},
        {
            "up.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
            "up.weight_scale_inv": torch.ones(1, 1),
        },
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors"},
        {"up.weight_packed": torch.ones(4, 4, dtype=torch.int32), "up.weight_scale": torch.ones(4, 1)},
    ),
    "awq": (
        {"quant_method": "awq"},
        {"up.qweight": torch.ones(4, 4, dtype=torch.int32), "up.scales": torch.ones(1, 32)},
    ),
}


@pytest.mark.parametrize("kind", STORED)
def test_the_missing_package_is_named(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section, tensors = STORED[kind]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)  # as if it were not installed
    with open_checkpoint(Source("m", "full", str(tmp_path))) as checkpoint, pytest.raises(CheckpointError) as caught:
        dequantise(checkpoint)
    assert f"'m' is quantised ({kind})" in str(caught.value) and EXTRA in str(caught.value)
    assert "Merge the unquantised checkpoints" in str(caught.value)


def test_the_extra_that_is_named_has_the_package() -> None:
    project = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert EXTRA == "pip install 'hf_frmerge[quantised]'" and 'quantised = ["compressed-tensors>=' in project


def test_recent_tensors_are_kept_up_to_a_limit_and_computed_once() -> None:
    computed: list[str] = []

    def of(name: str, nbytes: int) -> Any:
        def compute() -> np.ndarray:
            computed.append(name)
            return np.full(nbytes, len(name), np.uint8)

        return compute

    recent = Recent(limit=100)
    for name in ("a", "b", "a", "c", "a", "b", "large", "large", "a"):
        assert recent.get(name, of(name, 1000 if name == "large" else 40))[0] == len(name)
    # c drives out b, which was used before a; b drives out c; large drives out all and is kept nevertheless.
    assert computed == ["a", "b", "c", "b", "large", "a"]
    threads = [threading.Thread(target=lambda: recent.get("new", of("new", 10))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed.count("new") == 1
