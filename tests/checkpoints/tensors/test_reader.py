"""Reading safetensors: contents against safetensors' own reader, and every kind of broken file by its message."""

from __future__ import annotations

import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_frmerge.checkpoints import local_folder
from hf_frmerge.checkpoints import page_cache as pages
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_checkpoint, unchanged
from hf_frmerge.errors import CheckpointError


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def full(folder: Path, spec: str = "the-expert") -> Source:
    return Source(spec, "full", str(folder))


def write_raw(folder: Path, header: object, data: bytes, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_contents_equal_those_of_the_safetensors_library(tmp_path, save_model, size, dtype):
    save_model(tmp_path, dtype=dtype, max_shard_size=size)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (size == "20KB")
    with open_checkpoint(full(tmp_path)) as checkpoint:
        assert sorted(checkpoint.files) == shards
        seen = {}
        for shard in shards:
            with safe_open(tmp_path / shard, "pt") as reference:
                for name in reference.keys():  # noqa: SIM118 (not a dict)
                    seen[name] = reference.get_tensor(name)
        assert set(checkpoint.tensors) == set(seen)
        for name, tensor in seen.items():
            info = checkpoint.tensors[name]
            assert info.shape == tuple(tensor.shape)
            assert info.numel == tensor.numel()
            data = checkpoint.read(name)
            assert data.tobytes() == raw(tensor)
            assert checkpoint.read(name, 6, 10).tobytes() == raw(tensor)[6:10]
            assert not data.flags.writeable
        assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in seen.values())


def test_every_dtype_scalars_and_empty_tensors(tmp_path):
    dtypes = [torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn]
    tensors = {f"t{place}": torch.ones(3).to(dtype) for place, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(full(tmp_path)) as checkpoint:
        for name, tensor in tensors.items():
            assert checkpoint.read(name).tobytes() == raw(tensor)
        assert checkpoint.tensors["scalar"].shape == ()
        assert [checkpoint.tensors[f"t{place}"].is_float for place in range(7)] == [True, True] + [False] * 5


def test_tensors_come_in_file_order(tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float64)}, tmp_path / "model.safetensors")
    with open_checkpoint(full(tmp_path)) as checkpoint:
        offsets = [info.offset for info in checkpoint.tensors.values()]
    assert offsets == sorted(offsets)
    assert list(checkpoint.tensors) == ["b", "a"]  # wide dtypes first


def test_local_reads_are_views_of_the_page_cache(tmp_path):
    pytest.importorskip("hf_frmerge.kernels._native", reason="without it files are read, not mapped")
    save_file({"w": torch.zeros(1 << 16, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with open_checkpoint(full(tmp_path)) as checkpoint:
        view = checkpoint.read("w")
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x07")
        assert view[-1] == 7
        checkpoint.release("w")
    assert view[-1] == 7  # views outlive release and close


def test_plain_reads_where_pages_cannot_be_populated(tmp_path, save_model, monkeypatch):
    save_model(tmp_path)
    monkeypatch.setattr(pages, "fault_in", lambda ranges: False)  # as before Linux 5.14 and on macOS
    with open_checkpoint(full(tmp_path)) as checkpoint, safe_open(tmp_path / "model.safetensors", "pt") as reference:
        for name in checkpoint.tensors:
            data = checkpoint.read(name)
            assert data.tobytes() == raw(reference.get_tensor(name))
            assert not data.flags.writeable
            checkpoint.release(name)


def test_many_threads_and_more_shards_than_open_files(tmp_path):
    count = 3 * local_folder._OPEN_MAPPINGS
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(5000, generator=generator) for i in range(count)}
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        weight_map[name] = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensor}, tmp_path / weight_map[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with open_checkpoint(full(tmp_path)) as checkpoint:

        def work(seed: int) -> int:
            right = 0
            random = np.random.default_rng(seed)
            for _ in range(300):
                name = f"t{random.integers(count)}"
                start, stop = sorted(random.integers(0, 20001, 2))
                right += checkpoint.read(name, start, stop).tobytes() == raw(tensors[name])[start:stop]
                checkpoint.release(name, start, stop)
            return right

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [300] * 4
        if before is not None:
            assert len(os.listdir("/proc/self/fd")) - before <= local_folder._OPEN_MAPPINGS + 4


def test_ranges_outside_a_tensor_are_a_programming_error(tmp_path):
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    with open_checkpoint(full(tmp_path)) as checkpoint:
        for start, stop in ((0, 17), (-1, 4), (8, 4)):
            with pytest.raises(ValueError, match="outside tensor 'w' of 16 bytes"):
                checkpoint.read("w", start, stop)


def rewrite(path):
    """Other bytes of the same length, in place; the clock of a file system may stand still for some milliseconds."""
    before = path.stat()
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def replace(path):
    """Another file of the same length and time under the name."""
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(bytes(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (rewrite, "it was rewritten or replaced"),
        (replace, "it was rewritten or replaced"),
        (lambda path: path.unlink(), r"it cannot be found any more \(No such file or directory"),
        (lambda path: os.truncate(path, 99), r"it (had \d+ bytes and now has 99|was rewritten or replaced)"),
    ],
)
@pytest.mark.parametrize(
    ("file", "other"), [("model.safetensors", "config.json"), ("config.json", "model.safetensors")]
)
def test_a_file_that_changes_while_it_is_open_is_refused_by_name(tmp_path, save_model, change, how, file, other):
    save_model(tmp_path)
    with open_checkpoint(full(tmp_path)) as checkpoint:
        before = checkpoint.fingerprint()
        assert before[0][:2] == ("model.safetensors", (tmp_path / "model.safetensors").stat().st_size)
        (tmp_path / "training.log").write_text("the run goes on")
        (tmp_path / "link").hardlink_to(tmp_path / file)
        (tmp_path / file).chmod(0o600)
        checkpoint.check_unchanged()  # another file, another name and other permissions are no change
        change(tmp_path / file)
        with pytest.raises(
            CheckpointError, match=f"'the-expert': {tmp_path}/{file} changed while it was in use: {how}"
        ):
            checkpoint.check_unchanged()
        checkpoint.check_unchanged([other])
        assert checkpoint.fingerprint() == before  # of what was opened


def test_a_changed_file_explains_every_other_error(tmp_path, save_model):
    save_model(tmp_path)
    with open_checkpoint(full(tmp_path)) as checkpoint:
        with pytest.raises(ZeroDivisionError), unchanged([checkpoint]):
            1 / 0  # noqa: B018
        with pytest.raises(CheckpointError, match="rewritten or replaced"), unchanged([checkpoint]):
            rewrite(tmp_path / "model.safetensors")
            1 / 0  # noqa: B018
        with pytest.raises(CheckpointError, match="rewritten or replaced"), unchanged([checkpoint]):
            pass


def test_alias_reads_another_tensor_and_counts_once(tmp_path):
    save_file({"w": torch.arange(4.0)}, tmp_path / "model.safetensors")
    with open_checkpoint(full(tmp_path)) as checkpoint:
        checkpoint.alias("head", "w")
        assert checkpoint.read("head").tobytes() == raw(torch.arange(4.0))
        assert checkpoint.total_bytes == 16


# Files that break while they are in use


def opened(folder: Path) -> Checkpoint:
    save_file({"w": torch.zeros(100_000)}, folder / "model.safetensors")
    return open_checkpoint(full(folder))


@pytest.mark.parametrize("populates", [True, False])
@pytest.mark.parametrize("read_before", [True, False])
def test_file_cut_short_while_reading(tmp_path, monkeypatch, populates, read_before):
    if not populates:
        monkeypatch.setattr(pages, "fault_in", lambda ranges: False)
    checkpoint = opened(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    if read_before:
        checkpoint.read("w", 0, 4)
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError) as caught:  # and not SIGBUS
        checkpoint.read("w", 200_000, 300_000)
    message = str(caught.value)
    assert "'the-expert', tensor 'w'" in message
    assert f"it had {size} bytes and now has 5000" in message
    assert "model.safetensors" in message


def test_file_vanished_before_reading(tmp_path):
    checkpoint = opened(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"'the-expert', tensor 'w'.*No such file.*resume"):
        checkpoint.read("w")


def test_file_vanished_while_mapped_can_still_be_read(tmp_path):
    pytest.importorskip("hf_frmerge.kernels._native", reason="without it files are read, not mapped")
    checkpoint = opened(tmp_path)
    checkpoint.read("w", 0, 4)
    (tmp_path / "model.safetensors").unlink()
    assert not checkpoint.read("w").any()


# Broken headers


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": entry(0, 16, [4])}, b"\0" * 12, r"truncated: its header announces 86 bytes, the file has 82"),
        ({"w": entry(0, 16, [4])}, b"\0" * 20, r"has 4 bytes after the last tensor"),
        ({"w": entry(0, 16, [5])}, b"\0" * 16, r"'w' of shape \(5,\) and dtype F32 needs 20 bytes.*gives it 16"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12, r"'b' starts at byte \d+ and overlaps tensor"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, b"\0" * 20, r"'b' .*leaves a hole after tensor 'a'"),
        ({"a": entry(8, 16, [2])}, b"\0" * 16, r"'a' .*leaves a hole after the header"),
        ({"w": entry(0, 16, [4], "F99")}, b"\0" * 16, r"'w' has dtype 'F99'"),
        ({"w": entry(16, 0, [4])}, b"\0" * 16, r"broken header entry for tensor 'w'"),
        ({"w": entry(0, 16, [-4])}, b"\0" * 16, r"broken header entry for tensor 'w'"),
        ({"w": {"dtype": "F32", "shape": [4]}}, b"\0" * 16, r"broken header entry for tensor 'w'"),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"\0" * 4, r"broken header entry"),
        ({"w": 5}, b"", r"broken header entry for tensor 'w'"),
        ([], b"", r"not a JSON object"),
        (b"{nonsense", b"", r"not JSON"),
        ({}, b"", r"holds no tensors"),
        ({"__metadata__": {"format": "pt"}}, b"", r"holds no tensors"),
    ],
)
def test_broken_header(tmp_path, header, data, message):
    write_raw(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(full(tmp_path))
    assert "'the-expert'" in str(caught.value)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"abc", "has 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (struct.pack("<Q", 1 << 60), "not a safetensors file"),
        (struct.pack("<Q", 100_000_001) + b" " * 50, "100000000 is the most allowed"),
        (struct.pack("<Q", 500) + b"{}", r"truncated: its header alone needs 508 bytes, the file has 10"),
    ],
)
def test_not_a_safetensors_file(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(full(tmp_path))


# Broken indexes


@pytest.fixture
def sharded(tmp_path, save_model) -> Path:
    save_model(tmp_path, max_shard_size="20KB")
    return tmp_path


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_names_a_missing_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names the shard '{shard.name}', which is not in the folder"):
        open_checkpoint(full(sharded))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/../../x.safetensors", "..\\x", "C:x"])
def test_index_names_a_file_outside(sharded, name):
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match=r"not a file of the folder itself"):
        open_checkpoint(full(sharded))


def test_index_lists_a_tensor_no_shard_has(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update({"ghost": weight_map["model.norm.weight"]}))
    with pytest.raises(CheckpointError, match=r"lists 1 tensors that are not in the shard it names: 'ghost'"):
        open_checkpoint(full(sharded))


def test_index_leaves_out_a_tensor(sharded):
    edit_index(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"hold 1 tensors that .* does not list: 'model.norm.weight'"):
        open_checkpoint(full(sharded))


def test_index_without_weight_map(tmp_path):
    for content in ({}, {"weight_map": {}}, {"weight_map": []}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="has no `weight_map`"):
            open_checkpoint(full(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": 1}}')
    with pytest.raises(CheckpointError, match="maps w to something that is not a file name"):
        open_checkpoint(full(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json is not valid JSON"):
        open_checkpoint(full(tmp_path))


def test_tensor_in_two_shards(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"w": torch.zeros(2), "v": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"tensor 'w' is stored twice"):
        open_checkpoint(full(tmp_path))


def test_truncated_shard_is_named_with_both_sizes(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated: .*{size} bytes, the file has {size - 100}"):
        open_checkpoint(full(sharded))


def test_links_into_a_cache_are_followed(sharded, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    for shard in sharded.glob("model-*.safetensors"):
        shutil.move(shard, blobs / shard.name)
        shard.symlink_to(blobs / shard.name)
    with open_checkpoint(full(sharded)) as checkpoint:
        assert checkpoint.read("model.norm.weight").size == 64
    next(blobs.iterdir()).unlink()
    with pytest.raises(CheckpointError, match=r"is a link to .* which is not there"):
        open_checkpoint(full(sharded))


# Over the network and in memory


@pytest.fixture
def memory_copy():
    import fsspec

    fs = fsspec.filesystem("memory")

    def copy(folder: Path, name: str) -> str:
        for path in folder.iterdir():
            if path.is_file():
                fs.pipe_file(f"/{name}/{path.name}", path.read_bytes())
        return f"memory://{name}"

    yield copy
    fs.store.clear()


@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_memory_filesystem(tmp_path, save_model, memory_copy, open_folder_as, size):
    save_model(tmp_path, max_shard_size=size)
    local, remote = open_folder_as(tmp_path), open_folder_as(memory_copy(tmp_path, "m"))
    assert remote.tensors == local.tensors
    assert remote.files == local.files
    assert remote.config() == local.config()
    for name in local.tensors:
        assert np.array_equal(remote.read(name), local.read(name))
        assert np.array_equal(remote.read(name, 2, 8), local.read(name, 2, 8))
        assert remote.read(name, 4, 4).size == 0
    assert [entry[:2] for entry in remote.fingerprint()] == [entry[:2] for entry in local.fingerprint()]


def test_memory_file_that_vanishes(tmp_path, save_model, memory_copy, open_folder_as):
    import fsspec

    save_model(tmp_path)
    remote = open_folder_as(memory_copy(tmp_path, "m"), "far")
    fsspec.filesystem("memory").rm("/m/model.safetensors")
    with pytest.raises(CheckpointError, match=r"'far', tensor 'model.norm.weight'.*memory://m/model.safetensors"):
        remote.read("model.norm.weight")


def test_http_reads_only_the_ranges_it_needs(tmp_path, save_model, open_folder_as, web):
    url, handler = web
    save_model(tmp_path / "m", max_shard_size="20KB")
    local, remote = open_folder_as(tmp_path / "m"), open_folder_as(f"{url}/m")
    assert remote.tensors == local.tensors
    handler.ranges.clear()
    info = local.tensors["model.norm.weight"]
    assert np.array_equal(remote.read(info.name, 8, 24), local.read(info.name, 8, 24))
    assert handler.ranges == [f"{info.file} {info.offset + 8}-{info.offset + 23}"]


def test_http_server_that_ignores_ranges(tmp_path, save_model, open_folder_as, web):
    url, handler = web
    save_model(tmp_path / "m")
    handler.ignore_ranges = True
    with pytest.raises(CheckpointError, match="ignores byte ranges"):
        open_folder_as(f"{url}/m")


def test_http_folder_that_is_not_there(open_folder_as, web):
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        open_folder_as(f"{web[0]}/nothing")


def test_http_file_cut_short(tmp_path, save_model, open_folder_as, web):
    save_model(tmp_path / "m")
    remote = open_folder_as(f"{web[0]}/m")
    info = list(remote.tensors.values())[-1]
    os.truncate(tmp_path / "m" / "model.safetensors", info.offset + 10)
    with pytest.raises(CheckpointError, match=f"'{info.name}'.*asked for {info.nbytes} bytes .* got 10"):
        remote.read(info.name)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_weights_that_a_sharded_run_did_not_gather_are_named(tmp_path, kind):
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    tensors = {"embed.weight": torch.zeros(0, dtype=torch.bfloat16), "norm.weight": torch.ones(3)}
    save_file(tensors | {"rows.weight": torch.zeros(0, 3), "ids": torch.zeros(0, dtype=torch.int64)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"'m' holds tensors of shape \[0\]: embed\.weight\. .*zero_to_fp32\.py"):
        open_checkpoint(Source("m", kind, str(tmp_path)))
