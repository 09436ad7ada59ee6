"""Tensors that are products of stored factors, read in any pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from hf_frmerge.checkpoints.tensors.reader import open_tensors_file
from hf_frmerge.merging.operands.dense_tensors import ProductTensor, StoredTensor


def test_any_piece_of_a_product_is_that_of_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((6, 2)).astype(np.float32), rng.standard_normal((2, 5)).astype(np.float32)
    save_file({"w.up": up, "w.down": down}, tmp_path / "factors.safetensors")
    checkpoint = open_tensors_file(str(tmp_path), "factors.safetensors")
    tensor = ProductTensor(*(StoredTensor(checkpoint, checkpoint.tensors[f"w.{f}"]) for f in ("up", "down")), cols=5)
    expected = (up.astype(np.float64) @ down.astype(np.float64)).reshape(-1)
    for start, stop in ((0, 30), (0, 5), (3, 4), (4, 21), (29, 30)):
        operand = tensor.read(start, stop)
        assert operand.dtype == "F32"
        np.testing.assert_allclose(operand.data.view(np.float32), expected[start:stop], rtol=1e-6)
    assert tensor.files == {(checkpoint, "factors.safetensors")}
