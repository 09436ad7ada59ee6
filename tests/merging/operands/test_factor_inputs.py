"""Gram matrix and digests of a module's factors, against dense float64 products and the bytes in the files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_merges import merge_adapters
from numpy.typing import NDArray
from safetensors.torch import load_file
from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.adapters.adapter import open_adapter
from hf_frmerge.checkpoints.adapters.rows import align_adapters
from hf_frmerge.checkpoints.adapters.writer import AdapterModule, make_config, new_adapter
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import ADAPTER_FILE, Checkpoint
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.operands.factor_inputs import FactorInputs
from hf_frmerge.merging.planning.blocks import Piece

MODULES = [
    AdapterModule("layers.0.up", "linear", rank=3, n_out=17, input_shape=(11,)),
    AdapterModule("layers.0.down", "linear", rank=2, n_out=11, input_shape=(17,)),
]
ALPHA = 5
WHOLE = Piece(0, 17 * 11, 0, 1)

Reads = Counter[tuple[str, str, int, int]]


def make_adapter(folder: Path, seed: int, modules: list[AdapterModule]) -> Path:
    rng = np.random.default_rng(seed)
    config = make_config({"base_model_name_or_path": "base", "task_type": "CAUSAL_LM"}, modules)
    with new_adapter(folder, modules, config | {"lora_alpha": ALPHA, "alpha_pattern": {}}, "BF16") as writer:
        for module in modules:
            down, up = (rng.standard_normal(shape) for shape in module.shapes)
            writer.write(module, up, down)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three adapters; the second lacks a module."""
    return [make_adapter(tmp_path / f"{i}", i, MODULES[:1] if i == 1 else MODULES) for i in range(3)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """How often each range of each stored tensor was read."""
    counts: Reads = Counter()
    read = Checkpoint.read

    def counted(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        data = read(checkpoint, name, start, stop)
        counts[checkpoint.source.path, name, start, start + len(data)] += 1
        return data

    monkeypatch.setattr(Checkpoint, "read", counted)
    return counts


def whole_files(folders: list[Path], times: int) -> Reads:
    """What `reads` counts if every tensor is read as a whole."""
    return Counter(
        {
            (str(folder), name, 0, tensor.nbytes): times
            for folder in folders
            for name, tensor in load_file(folder / ADAPTER_FILE).items()
        }
    )


def open_inputs(folders: list[Path], module: AdapterModule) -> FactorInputs:
    rows = align_adapters([open_adapter(Source(str(folder), "adapter", str(folder))) for folder in folders])
    row = next(row for row in rows if row.first.module == module.module)
    return FactorInputs(row, {i: str(folder) for i, folder in enumerate(folders)})


def expected_deltas(folders: list[Path], module: AdapterModule) -> tuple[NDArray[np.float64], dict[int, str]]:
    """Dense deltas as rows, and the digests of scale, down and up by adapter."""
    rows, digests = [], {}
    for index, folder in enumerate(folders):
        tensors = load_file(folder / ADAPTER_FILE)
        if module.keys[0] not in tensors:
            rows.append(np.zeros(17 * 11))
            continue
        down, up = (tensors[key] for key in module.keys)
        scale = ALPHA / module.rank
        rows.append(scale * (up.double() @ down.double()).numpy().reshape(-1))
        stored = b"".join(factor.view(torch.uint8).numpy().tobytes() for factor in (down, up))
        digests[index] = xxh3_128_hexdigest(repr(scale).encode() + stored)
    return np.stack(rows), digests


def test_gram_and_digests_come_from_one_read_of_each_factor(folders: list[Path], reads: Reads) -> None:
    for module in MODULES:
        gram, digests = open_inputs(folders, module).gram(load_kernels(), WHOLE)
        deltas, expected = expected_deltas(folders, module)
        np.testing.assert_allclose(gram[0], deltas @ deltas.T, rtol=1e-12, atol=1e-12)
        assert digests == expected
    assert reads == whole_files(folders, times=1)


def test_digests_alone_are_the_same(folders: list[Path], reads: Reads) -> None:
    for module in MODULES:
        assert open_inputs(folders, module).digests(WHOLE) == expected_deltas(folders, module)[1]
    assert reads == whole_files(folders, times=1)


@pytest.mark.parametrize(("options", "times"), [({}, 2), ({"adapter_rank": 2}, 2), ({"adapter_energy": 0.5}, 3)])
def test_a_merge_reads_factors_for_the_gram_matrix_the_rank_and_the_output(
    folders: list[Path], reads: Reads, tmp_path: Path, options: dict[str, float], times: int
) -> None:
    """A rank has to be measured only where an energy is asked for."""
    merge_adapters(folders, [0.5, 0.25, 0.25], tmp_path / "merged", **options)
    assert reads == whole_files(folders, times)
