"""Rows of a stored tensor in another order, read in pieces that begin and end within rows, and rows filled in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_frmerge.checkpoints.source import Source
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_checkpoint
from hf_frmerge.merging.operands.dense_tensors import StoredTensor
from hf_frmerge.merging.operands.row_mapped import RowFill, RowMappedTensor, StoredRows

COLS = 5
# In the order of the stored rows in part, turned, repeated, and with rows that are not stored.
MAPS = {"a": [0, 1, 2, 5, 4, 3, -1, -1, 6, -1], "b": [3, -1, 2, 1, 0, 0, 4, -1, -1, -1], "base": [-1] * 8 + [1, -1]}
RANGES = [(0, 50), (0, 15), (2, 14), (7, 29), (16, 19), (24, 50), (30, 35), (33, 48), (41, 44), (45, 50)]


def opened(folder: Path, dtype: torch.dtype, seed: int) -> Checkpoint:
    folder.mkdir()
    values = torch.randn(7, COLS, generator=torch.Generator().manual_seed(seed)).to(dtype)
    save_file({"w": values}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return open_checkpoint(Source(folder.name, "full", str(folder)))


def values_of(checkpoint: Checkpoint) -> np.ndarray:
    info = checkpoint.tensors["w"]
    return widen(checkpoint.read("w"), info.dtype).astype(np.float64).reshape(info.shape)


def rows_of(checkpoint: Checkpoint, rows: list[int]) -> StoredRows:
    return StoredRows(StoredTensor(checkpoint, checkpoint.tensors["w"]), np.array(rows), COLS)


@pytest.mark.parametrize("weights", [(0.25, 0.75), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ranges_of_every_model(tmp_path: Path, dtype: torch.dtype, weights: tuple[float, float]) -> None:
    files = {name: opened(tmp_path / name, dtype, seed) for seed, name in enumerate(MAPS)}
    wide = "F64" if dtype == torch.float64 else "F32"
    stored = {name: rows_of(files[name], MAPS[name]) for name in MAPS}
    fill = RowFill(
        [(weights[0], stored["a"]), (weights[1], stored["b"])], stored["base"], rows_of(files["base"], [*range(7)])
    )
    values = {name: values_of(checkpoint) for name, checkpoint in files.items()}
    for name in MAPS:
        expected = np.empty((10, COLS))
        for place in range(10):
            own = {other: values[other][MAPS[other][place]] for other in MAPS if MAPS[other][place] >= 0}
            having = [(w, own[each]) for w, each in zip(weights, "ab") if each in own]
            total = sum(w for w, _ in having)
            if name in own:
                expected[place] = own[name]
            elif having:
                expected[place] = sum(w * row for w, row in having) / total if total else having[0][1]
            else:
                expected[place] = own.get("base", values["base"].mean(0))
        tensor = RowMappedTensor(stored[name], fill, wide)
        for start, stop in RANGES:
            read = tensor.read(start, stop)
            actual = widen(read.data, read.dtype).astype(np.float64)
            tolerance = 1e-14 if wide == "F64" else 1e-6
            np.testing.assert_allclose(actual, expected.reshape(-1)[start:stop], rtol=tolerance, atol=tolerance)
    assert tensor.files == {(checkpoint, "model.safetensors") for checkpoint in files.values()}


def test_rows_that_lie_together_are_not_copied(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path / "a", torch.float32, 0)
    tensor = RowMappedTensor(rows_of(checkpoint, [2, 3, 4, 0, 1]))
    together, apart = tensor.mapped(1, 3 * COLS), tensor.mapped(0, 4 * COLS)
    assert together is not None and apart is None
    assert np.shares_memory(tensor.read(1, 3 * COLS).data, checkpoint.read("w"))
    offset = checkpoint.tensors["w"].offset
    assert together[1:] == (offset + 4 * (2 * COLS + 1), offset + 4 * 5 * COLS)
