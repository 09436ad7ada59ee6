"""No flipped bit of what an interrupted calibration keeps is believed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hf_frmerge.calibration.blocks.block_files import BlockFiles
from hf_frmerge.calibration.kept_files import read_kept, write_kept
from hf_frmerge.calibration.refinement.progress_file import Best, Progress, read_progress, write_progress
from hf_frmerge.calibration.sweep import FittedBlock
from hf_frmerge.errors import ResumeError

NAMES = {"q": "layers.0.q", "v": "layers.0.v"}


def with_one_bit_flipped(path: Path) -> Iterator[None]:
    """Flip every bit of a file, one at a time."""
    intact = path.read_bytes()
    for bit in range(8 * len(intact)):
        content = bytearray(intact)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        yield
    path.write_bytes(intact)


def n_refused(path: Path, read: Callable[[], None]) -> int:
    """Return how many flipped bits are refused; of the others, `read` must find that they change no value."""
    refused = 0
    for _ in with_one_bit_flipped(path):
        try:
            read()
        except ResumeError as error:
            assert re.match(rf".*{path.name} .*damaged.*Pass --overwrite to start anew", str(error))
            refused += 1
    read()
    return refused


def test_of_a_block(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, {"dtype": "float32"})
    block = FittedBlock({"q": torch.arange(6.0).view(2, 3)}, {"v": (torch.ones(2, 1), torch.ones(1, 3))})
    files.write(0, NAMES, block)
    [path] = tmp_path.glob("*.safetensors")

    def read() -> None:
        again = files.read(0, NAMES)
        assert again is not None and torch.equal(again.corrections["q"], block.corrections["q"])
        assert all(map(torch.equal, again.factors["v"], block.factors["v"]))

    assert n_refused(path, read) == 8 * path.stat().st_size


def test_of_a_refinement(tmp_path: Path) -> None:
    path, one = tmp_path / "refinement.safetensors", {"q.up": torch.arange(3.0)}
    write_progress(path, Progress(3, one, one, one, Best({"q.up": torch.ones(3, dtype=torch.bfloat16)}, (0.5,), 2)))

    def read() -> None:
        again = read_progress(path, torch.device("cpu"))
        assert again is not None and (again.step, again.best.step, again.best.distances) == (3, 2, (0.5,))
        assert all(torch.equal(group["q.up"], one["q.up"]) for group in (again.values, again.first, again.second))
        assert torch.equal(again.best.corrections["q.up"], torch.ones(3, dtype=torch.bfloat16))

    assert n_refused(path, read) > 8 * (path.stat().st_size - 30)  # all but those of {"format": "pt"}


def test_of_a_record(tmp_path: Path) -> None:
    path, record = tmp_path / "calibration.json", {"tokens": 100, "distances": {"start": [0.5, None]}}
    write_kept(path, record)

    def read() -> None:
        assert read_kept(path) == record

    assert n_refused(path, read) == 8 * path.stat().st_size
