"""Writing shards: byte for byte what `save_pretrained` writes, and nothing that looks finished before it is."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from hf_frmerge.checkpoints.tensors.layout import ShardLayout
from hf_frmerge.checkpoints.tensors.writer import STAGING, CheckpointWriter, check_free_space, remove_weights
from hf_frmerge.errors import MergeError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    CODES[torch.float8_e8m0fnu] = "F8_E8M0"


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def plan(tensors: dict[str, torch.Tensor], limit: int = 50 * 10**9) -> ShardLayout:
    return ShardLayout.plan([(name, CODES[t.dtype], t.shape) for name, t in tensors.items()], limit)


def write(tensors: dict[str, torch.Tensor], folder: Path, limit: int = 50 * 10**9) -> CheckpointWriter:
    writer = CheckpointWriter(plan(tensors, limit), folder)
    writer.create()
    for name, tensor in tensors.items():
        writer.write(name, 0, raw(tensor))
    return writer


def saved_state(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a model that are in its files, in the order `save_pretrained` saw them."""
    stored = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    return {name: tensor for name, tensor in model.state_dict().items() if name in stored}


# Layout


@pytest.mark.parametrize("limit", [50 * 10**9, 15_000, 9_000])
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("bert", True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_files_equal_save_pretrained_byte_for_byte(tmp_path, save_model, limit, kind, tied, dtype):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model = save_model(theirs, kind, dtype=dtype, max_shard_size=limit, tie_word_embeddings=tied)
    write(saved_state(model, theirs), ours, limit).finish()
    expected = {path.name: path.read_bytes() for path in theirs.glob("model*")}
    assert {path.name: path.read_bytes() for path in ours.glob("model*")} == expected
    assert (len(expected) > 1) == (limit < 50 * 10**9)


def test_header_equals_that_of_the_safetensors_library_for_every_dtype(tmp_path):
    tensors = {f"t{place}": torch.ones(3).to(dtype) for place, dtype in enumerate(CODES)}
    tensors |= {'é"\\\n': torch.zeros(2), "scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}
    write(tensors, tmp_path / "ours").finish()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 15))
def test_split_equals_that_of_huggingface_hub(sizes, limit):
    tensors = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    reference = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    layout = plan(tensors, limit)
    actual = {shard.file: sorted(shard.names) for shard in layout.shards}
    assert actual == {file: sorted(names) for file, names in reference.filename_to_tensors.items()}
    assert layout.total_size == reference.metadata["total_size"]


def test_where_points_at_the_data(tmp_path):
    tensors = {f"t{i}": torch.full((i + 1,), i, dtype=torch.int32) for i in range(6)}
    layout = plan(tensors, 30)
    write(tensors, tmp_path, 30).finish()
    for name, tensor in tensors.items():
        shard, offset = layout.where(name)
        data = (tmp_path / layout.shards[shard].file).read_bytes()
        assert data[offset : offset + tensor.nbytes] == raw(tensor).tobytes()
    assert layout.file_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("limit", [50 * 10**9, 15_000])
def test_transformers_loads_what_was_written(tmp_path, save_model, limit):
    for kind, auto in (("llama", AutoModelForCausalLM), ("bert", AutoModel)):
        model = save_model(tmp_path / kind, kind, seed=3)
        state = saved_state(model, tmp_path / kind)
        ours = tmp_path / f"{kind}-ours"
        write(state, ours, limit).finish()
        model.config.save_pretrained(ours)
        loaded, info = auto.from_pretrained(ours, output_loading_info=True)
        wanted, wanted_info = auto.from_pretrained(tmp_path / kind, output_loading_info=True)
        assert info["missing_keys"] == wanted_info["missing_keys"]
        for name, tensor in wanted.state_dict().items():
            if not name.startswith("pooler"):  # not in a masked LM, so drawn afresh
                assert torch.equal(loaded.state_dict()[name], tensor), name


# Writing


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(700 + 13 * i, generator=generator) for i in range(5)}


def test_pieces_from_many_threads(tmp_path, tensors):
    writer = CheckpointWriter(plan(tensors, 6000), tmp_path)
    writer.create()
    pieces = [(name, start) for name, tensor in tensors.items() for start in range(0, tensor.nbytes, 333)]
    np.random.default_rng(0).shuffle(pieces)

    def work(piece: tuple[str, str]) -> None:
        name, start = piece[0], int(piece[1])
        writer.write(name, start, raw(tensors[name])[start : start + 333])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, pieces))
    for name, tensor in tensors.items():
        assert np.array_equal(writer.read_back(name, 8, 400), raw(tensor)[8:400])
    writer.finish()
    actual = {name: t for path in tmp_path.glob("*.safetensors") for name, t in load_file(path).items()}
    assert all(torch.equal(actual[name], tensor) for name, tensor in tensors.items())


def test_large_writes_start_the_disk_early_and_arrive_whole(tmp_path):
    tensors = {"big": torch.arange(80 << 17, dtype=torch.int64)}  # 80 MiB: passes the writeback threshold twice
    writer = CheckpointWriter(plan(tensors), tmp_path)
    writer.create()
    data = raw(tensors["big"])
    for start in range(0, data.size, 1 << 20):
        writer.write("big", start, data[start : start + (1 << 20)])
    writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["big"], tensors["big"])


def test_nothing_looks_finished_before_finish(tmp_path, tensors):
    write(tensors, tmp_path, 6000).sync()
    assert [path.name for path in tmp_path.iterdir()] == [STAGING]
    assert not list((tmp_path / STAGING).glob("*.safetensors"))


def test_finish_removes_weights_of_an_earlier_merge(tmp_path, tensors):
    write(tensors, tmp_path, 3010).finish()
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 5
    for other in ("keep.safetensors", "adapter_model.safetensors", "model.onnx"):
        (tmp_path / other).touch()
    write(tensors, tmp_path).finish()  # one file: transformers would prefer neither index nor old shards to it
    kept = ["adapter_model.safetensors", "keep.safetensors", "model.onnx", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == kept
    write(tensors, tmp_path, 3010).finish()  # and back: a stale single file would be loaded first
    assert not (tmp_path / "model.safetensors").exists()
    remove_weights(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == kept[:-1]


def test_ranges_outside_a_tensor_are_a_programming_error(tmp_path, tensors):
    writer = write(tensors, tmp_path)
    for start, data in ((2800, b"x"), (-1, b"x"), (2797, b"1234")):
        with pytest.raises(ValueError, match="outside 't0' of 2800 bytes"):
            writer.write("t0", start, data)
    writer.close()


# Going on after a crash


def test_tensors_side_by_side_are_written_with_one_call(tmp_path):
    layout = ShardLayout.plan([(name, "F32", (2,)) for name in "abc"])
    writer = CheckpointWriter(layout, tmp_path)
    writer.create()
    values = np.arange(6, dtype="f")
    writer.write_next(["a", "b"], values[:4].view(np.uint8))
    writer.write_next(["c"], values[4:].view(np.uint8))
    for names, data in ((["a", "c"], 16), (["b", "a"], 16), (["a", "b"], 8), (["b", "c"], 24)):
        with pytest.raises(ValueError, match=r"beside|Expected 16 bytes"):
            writer.write_next(names, np.zeros(data, np.uint8))
    writer.finish()
    merged = load_file(tmp_path / "model.safetensors")
    assert [merged[name].tolist() for name in "abc"] == [[0, 1], [2, 3], [4, 5]]


def test_reopen_keeps_what_was_written(tmp_path, tensors):
    writer = write(tensors, tmp_path, 6000)
    writer.close()
    again = CheckpointWriter(plan(tensors, 6000), tmp_path)
    assert again.reopen() == []
    for name, tensor in tensors.items():
        assert np.array_equal(again.read_back(name, 0, tensor.nbytes), raw(tensor))
    again.finish()
    assert len(list(tmp_path.glob("model-*.safetensors"))) == len(plan(tensors, 6000).shards)


def test_reopen_makes_missing_and_damaged_shards_afresh(tmp_path, tensors):
    layout = plan(tensors, 3010)
    write(tensors, tmp_path, 3010).close()
    staged = [tmp_path / STAGING / f"{shard.file}.partial" for shard in layout.shards]
    staged[1].unlink()
    os.truncate(staged[2], layout.shards[2].size - 4)
    with staged[3].open("r+b") as file:
        file.write(b"\0" * 8)  # killed before the header was on disk
    again = CheckpointWriter(layout, tmp_path)
    assert again.reopen() == [1, 2, 3]
    assert not again.read_back("t1", 0, 2852).any()
    assert np.array_equal(again.read_back("t4", 0, 3008), raw(tensors["t4"]))
    again.close()


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("where", ["staged", "final"])
def test_files_with_another_name_are_never_gone_on_with(tmp_path, tensors, link, where):
    """Same size, same header: an expert's file that hangs in the folder looks like unfinished work."""
    layout = plan(tensors)
    expert, out = tmp_path / "expert.safetensors", tmp_path / "out"
    save_file(tensors, expert, metadata={"format": "pt"})
    before = expert.read_bytes()
    (out / STAGING).mkdir(parents=True)
    place = out / STAGING / "model.safetensors.partial" if where == "staged" else out / "model.safetensors"
    link(expert, place)
    again = CheckpointWriter(layout, out)
    assert again.reopen() == [0]
    again.write("t0", 0, bytes(8))
    again.finish()
    assert expert.read_bytes() == before
    assert (out / "model.safetensors").read_bytes()[: len(layout.shards[0].header)] == layout.shards[0].header
    assert not (out / "model.safetensors").is_symlink()
    assert not load_file(out / "model.safetensors")["t0"].any()


def refusing(monkeypatch, call, number):
    """Let a call of the system fail once."""
    real = getattr(os, call)

    def fails(*args):
        monkeypatch.setattr(os, call, real)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fails)


def test_a_staged_file_that_cannot_be_opened_is_not_lost(tmp_path, tensors, monkeypatch):
    write(tensors, tmp_path).close()
    staged = tmp_path / STAGING / "model.safetensors.partial"
    before = staged.read_bytes()
    again = CheckpointWriter(plan(tensors), tmp_path)
    refusing(monkeypatch, "open", errno.EMFILE)
    with pytest.raises(MergeError, match="partial could not be opened: Too many open files"):
        again.reopen()
    assert staged.read_bytes() == before


def test_blocks_need_not_be_reserved_where_they_cannot_be(tmp_path, tensors, monkeypatch):
    refusing(monkeypatch, "posix_fallocate", errno.EOPNOTSUPP)
    write(tensors, tmp_path).finish()
    actual = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(actual[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("call", ["fsync", "close"])
def test_weights_that_did_not_reach_the_disk_get_no_name(tmp_path, tensors, monkeypatch, call):
    writer = write(tensors, tmp_path)
    refusing(monkeypatch, call, errno.EIO)
    with pytest.raises(MergeError, match="partial could not be written: Input/output error"):
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == [STAGING]


def test_writes_that_the_system_cuts_short_arrive_whole(tmp_path, tensors, monkeypatch):
    """Headers, tensors and small files: a system may take fewer bytes than it is given."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: pwrite(fd, data[: len(data) // 2 + 1], start))
    write(tensors, tmp_path / "ours", 6000).finish()
    monkeypatch.undo()
    write(tensors, tmp_path / "whole", 6000).finish()
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("model*")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").glob("model*")} == expected


def test_a_disk_that_takes_no_byte_is_an_error(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda fd, data, start: 0)
    with pytest.raises(MergeError, match=r"model.safetensors.partial could not be created: the system takes no more"):
        write(tensors, tmp_path)


def test_killed_between_two_renames(tmp_path, tensors):
    layout = plan(tensors, 3010)
    write(tensors, tmp_path, 3010).sync()
    for index in (0, 1):  # as far as `publish` came
        (tmp_path / STAGING / f"{layout.shards[index].file}.partial").rename(tmp_path / layout.shards[index].file)
    again = CheckpointWriter(layout, tmp_path)
    assert again.reopen() == []
    assert not list(tmp_path.glob("model*"))  # unfinished again, and looks it
    assert np.array_equal(again.read_back("t0", 0, 2800), raw(tensors["t0"]))
    again.finish()
    assert len(load_file(tmp_path / layout.shards[0].file)) == 1


def test_publish_refuses_when_a_shard_is_gone(tmp_path, tensors):
    writer = write(tensors, tmp_path, 3010)
    writer.sync()
    (tmp_path / STAGING / f"{writer.layout.shards[2].file}.partial").unlink()
    with pytest.raises(MergeError, match=r"model-00003-of-00005\.safetensors\.partial is missing"):
        writer.publish()
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_processes_write_their_own_shards(tmp_path, tensors):
    layout = plan(tensors, 3010)
    ranks = [CheckpointWriter(layout, tmp_path, shards=range(rank, 5, 2)) for rank in (0, 1)]
    for rank, writer in enumerate(ranks):
        writer.create()
        for index in range(rank, 5, 2):
            writer.write(f"t{index}", 0, raw(tensors[f"t{index}"]))
    for writer in ranks:
        writer.sync()
    ranks[0].publish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


# Full disks


def test_check_free_space_names_both_numbers(tmp_path):
    check_free_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(MergeError, match=r"1000000000.00 GB \(1000000000000000000 bytes\) are still needed, .* free"):
        check_free_space(tmp_path, 10**18)


_ON_A_FULL_DISK = """
import sys
from hf_frmerge.checkpoints.tensors.writer import CheckpointWriter, ShardLayout
from hf_frmerge.errors import MergeError
layout = ShardLayout.plan([("a", "F32", (100_000,)), ("b", "F32", (200_000,))], 500_000)
writer = CheckpointWriter(layout, sys.argv[1])
try:
    writer.create()
except MergeError as error:
    print(error)
print(sorted(path.name for path in writer.staging.iterdir()))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux mount namespaces")
def test_full_disk_is_known_before_the_work(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_ON_A_FULL_DISK)
    mount = tmp_path / "small"
    mount.mkdir()
    # A real file system of 1 MB, in a mount namespace of its own.
    command = f"mount -t tmpfs -o size=1M tmpfs {mount} && {sys.executable} {script} {mount}"
    run = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, check=False)
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip(f"no mount namespaces here: {run.stderr.strip()}")
    message, left = run.stdout.strip().splitlines()
    assert "Not enough space" in message
    needed = int(re.search(r"\((\d+) bytes\) are still needed", message)[1])
    assert 400_000 <= needed < 401_000  # the second shard; the first was created
    assert "'model-00001-of-00002.safetensors.partial'" in left
    assert "00002-of-00002" not in left  # the one that did not fit


def test_file_size_limit_is_an_error_that_keeps_the_rest(tmp_path, tensors):
    writer = CheckpointWriter(plan(tensors, 3010), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.layout.shards[4].size - 1, hard))
    try:
        with pytest.raises(MergeError, match=r"model-00005-of-00005.*could not be created: File too large") as caught:
            writer.create()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert len(list((tmp_path / STAGING).iterdir())) == 4
    writer.close()


def test_a_thousand_shards_take_few_open_files(tmp_path):
    tensors = {f"w{index}": torch.full((4,), float(index)) for index in range(1000)}
    before = len(os.listdir("/proc/self/fd"))
    writer = write(tensors, tmp_path, 16)
    assert len(os.listdir("/proc/self/fd")) - before < 100
    assert bytes(writer.read_back("w999", 4, 8)) == raw(tensors["w999"])[4:8].tobytes()
    writer.finish()
    assert len(os.listdir("/proc/self/fd")) == before
    assert torch.equal(load_file(tmp_path / "model-01000-of-01000.safetensors")["w999"], tensors["w999"])


def test_a_shard_that_was_replaced_while_it_was_closed_is_not_written_to(tmp_path):
    tensors = {f"w{index}": torch.ones(4) for index in range(100)}
    writer = write(tensors, tmp_path, 16)
    staged = writer._staged(99)
    (tmp_path / "theirs").write_bytes(bytes(writer.layout.shards[99].size))  # before the inode of the other is free
    staged.unlink()
    os.link(tmp_path / "theirs", staged)
    with pytest.raises(MergeError, match="another program replaced it"):
        writer.write("w99", 0, raw(tensors["w99"]))
    assert not any((tmp_path / "theirs").read_bytes())
