"""Tensors of `torch.save`, read in place, against `torch.load`; and what is refused."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch

from hf_frmerge.checkpoints.source import Source
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_checkpoint
from hf_frmerge.errors import CheckpointError


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(Source(str(folder), "full", str(folder), is_pickled=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


def test_every_element_is_that_of_torch_load(folder: Path) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(6, 10)
    saved = {str(dtype): (matrix * 9).to(dtype) for dtype in DTYPES}
    saved |= {
        "shared": saved["torch.float32"],
        "part": saved["torch.float32"][2:4],
        "column": saved["torch.float32"][:, 3],
        "transposed": matrix.t(),
        "turned": torch.randn(3, 4, 5).permute(2, 0, 1),
        "repeated": torch.randn(1, 7).expand(4, 7),
        "every other": torch.arange(20.0)[1::2],
        "parameter": torch.nn.Parameter(matrix.clone()),
        "number": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "fp8": matrix.to(torch.float8_e4m3fn),
    }
    torch.save(saved, folder / "pytorch_model.bin")
    loaded = torch.load(folder / "pytorch_model.bin", weights_only=True)
    with opened(folder) as checkpoint:
        assert list(checkpoint.tensors) == list(loaded)
        for name, tensor in loaded.items():
            info = checkpoint.tensors[name]
            expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            assert (info.shape, info.nbytes) == (tuple(tensor.shape), expected.nbytes)
            assert (checkpoint.read(name) == expected).all(), name
            for start in range(0, expected.nbytes - 3, 7):
                assert (checkpoint.read(name, start, start + 3) == expected[start : start + 3]).all(), name


class Evil:
    """Makes a folder when it is loaded as pickles usually are."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_code_that_a_pickle_names_is_not_run(folder: Path) -> None:
    mark = folder / "was here"
    torch.save({"a": torch.ones(2), "b": Evil(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(\w+\.mkdir\)") as caught:
        opened(folder)
    assert "weights_only" not in str(caught.value)  # torch's own advice is to run it
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "a pickle without code would test nothing"


def test_what_holds_the_tensors_is_to_be_saved_by_itself(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, file)
    with pytest.raises(CheckpointError, match="holds a dict under 'state_dict', expected tensors by name") as caught:
        opened(folder)
    advice = str(caught.value).split("`")[1]
    exec(advice, {"torch": torch, "FILE": str(file), "NAME": "state_dict"})
    assert list(opened(folder).tensors) == ["a"]


def test_the_old_format_is_to_be_saved_anew(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"is no zip file, as torch writes it since 1\.6") as caught:
        opened(folder)
    program = "\n".join(line.strip() for line in str(caught.value).split("\n")[1:])
    exec(program.replace("FOLDER", str(folder)))
    assert list(opened(folder).tensors) == ["a"]


def rewritten(file: Path, compression: int = zipfile.ZIP_STORED, **changes: bytes) -> None:
    """Write the zip file anew, with other contents of some entries."""
    content = io.BytesIO(file.read_bytes())
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            data = changes.get(entry.filename.rpartition("/")[2], old.read(entry))
            new.writestr(entry.filename, data, compression)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:600]), "is truncated or damaged"),
        (lambda file: rewritten(file, zipfile.ZIP_DEFLATED), "are not where the file says|truncated or damaged"),
        (lambda file: rewritten(file, byteorder=b"big"), "its numbers are big-endian"),
        (lambda file: rewritten(file, **{"data.pkl": b"nonsense"}), "holds more than tensors|truncated or damaged"),
        (lambda file: torch.save([torch.ones(2)], file), "holds a list, expected tensors by name"),
        (lambda file: torch.save({"a": torch.ones(2, 2).to_sparse()}, file), "expected tensors by name alone"),
        (lambda file: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, file), "torch.complex64, which cannot"),
    ],
)
def test_damaged_files_are_refused(folder: Path, damage: object, message: str) -> None:
    file = folder / "pytorch_model.bin"
    torch.save({"a": torch.randn(400), "b": torch.randn(3)}, file)
    damage(file)
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin.*({message})"):
        opened(folder)


def test_a_tensor_that_reaches_beyond_its_entry_is_refused(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    torch.save({"a": torch.randn(400), "b": torch.randn(3)}, file)
    rewritten(file, **{"0": bytes(40)})
    with pytest.raises(CheckpointError, match=r"'a' are not where the file says"):
        opened(folder)
