"""Merges of models of the Hub: refused before a download, downloaded once, or streamed without one."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import Result
from click_runner import click_runner
from hub_server import ALICE_TOKEN, HubServer
from merge_reference import random_model, write_family, write_model
from packaging.version import Version
from safetensors.torch import load_file, save_file

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.cli.main import main
from hf_frmerge.demo.texts import expert_dirs
from hf_frmerge.errors import CheckpointError, HubError, MergeError
from hf_frmerge.merging.planning import blocks
from hf_frmerge.provenance.verify import verify

MODELS = ["lab/e0", "lab/e1"]
# The Hub's client of these versions knows no list of a commit's files in the cache, and waits as it sees fit.
OLD_CLIENT = Version(version("huggingface_hub")) < Version("1.31")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def merge(out: Path, experts: list[str] = MODELS, base: str | None = None, **options: Any) -> FisherRaoMerger:
    args = MergingArguments(output_dir=str(out), disable_tqdm=True, **options)
    return FisherRaoMerger(experts, args, [0.6, 0.4], base_model=base).merge()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def spans(hub: HubServer) -> dict[str, list[tuple[int, int]]]:
    """First byte and byte after the last of every request for weights, by the file in the storage."""
    actual: dict[str, list[tuple[int, int]]] = {}
    for request in hub.sent("GET", r"/lfs-storage/"):
        first, last = request.headers["range"].removeprefix("bytes=").split("-")
        actual.setdefault(request.path.split("?")[0], []).append((int(first), int(last) + 1))
    return actual


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits are named by their content, so another test's files would be found in a cache they share."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def family(hub: HubServer, tmp_path: Path) -> Path:
    """`lab/base`, and its fine-tunes `lab/e0` and `lab/e1` in two shards, with files no merge needs."""
    base, experts = write_family(tmp_path / "local", n=2, dtype=torch.bfloat16)
    for name, folder in zip(("base", "e0", "e1"), (base, *experts)):
        (Path(folder) / "README.md").write_text("---\nlicense: mit\n---\n")
        extra = {"pytorch_model.bin": b"p" * 999, "onnx/model.onnx": b"o" * 999, "original/consolidated.pth": b"c"}
        extra |= {"onnx/config.json": b"{}", "model.gguf": b"g" * 999, "trainer_state.json": b"{}"}
        hub.add_repo(f"lab/{name}", {**contents(Path(folder)), **extra})
    return tmp_path / "local"


def test_sources_are_resolved_once_and_only_needed_files_fetched(hub: HubServer, family: Path, tmp_path: Path) -> None:
    experts = [str(family / "e0"), str(family / "e1")]
    merge(tmp_path / "local-merge", experts, str(family / "base"), space="deltas")
    merge(tmp_path / "out", ["lab/e0@main", "lab/e1"], "lab/base", space="deltas")
    assert weights(tmp_path / "out") == weights(tmp_path / "local-merge")
    asked = Counter(request.path for request in hub.sent("GET", r"/api/models/[\w/]+(/revision/\w+)?$"))
    if OLD_CLIENT:  # it asks once more for what a commit holds, before it downloads the commit
        asked = Counter({path: n for path, n in asked.items() if not re.search(r"/revision/\w{40}$", path)})
    assert asked == {"/api/models/lab/e0/revision/main": 1, "/api/models/lab/e1": 1, "/api/models/lab/base": 1}
    assert hub.sent("GET", r"\.bin|onnx|original|gguf|trainer_state") == []
    whole = [r for r in hub.sent("GET", "/lfs-storage/") if "range" not in r.headers]
    assert len(whole) == 3  # every weight file once
    before = len(hub.requests)
    merge(tmp_path / "again", overwrite=True)
    if not OLD_CLIENT:
        assert len(hub.requests) - before == len(MODELS)  # from the cache: only the commits are asked for


def test_streamed_merge_downloads_no_file_and_gives_the_same_bits(
    hub: HubServer, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_frmerge.checkpoints.hub.folder._FIRST_BYTES", 100)
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 400)
    experts = [str(family / "e0"), str(family / "e1")]
    merge(tmp_path / "local-merge", experts, str(family / "base"), space="deltas")
    merger = merge(tmp_path / "out", MODELS, "lab/base", space="deltas", stream_from_hub=True, hub_token=ALICE_TOKEN)
    assert weights(tmp_path / "out") == weights(tmp_path / "local-merge")
    actual = spans(hub)  # every request for weights has a range
    assert len(actual) == 3
    for path, ranges in actual.items():
        size = len(hub.lfs[path.rpartition("/")[2]])
        assert max(stop - start for start, stop in ranges) < size / 3
        assert size <= sum(stop - start for start, stop in ranges) < size + 200  # each byte once, but for the header
    commits = [hub.repos["models", name].branches["main"] for name in (*MODELS, "lab/base")]
    assert [source["revision"] for source in merger.state.sources] == commits
    assert not list((tmp_path / "out").rglob("*@*"))
    assert verify(str(tmp_path / "out")).ok
    for request in hub.requests:
        if "lfs-storage" in request.path:
            assert "authorization" not in request.headers


def test_streaming_reads_twice_what_it_may_not_keep(
    hub: HubServer, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_frmerge.checkpoints.hub.folder._KEPT_BYTES", 0)
    merge(tmp_path / "local-merge", [str(family / "e0"), str(family / "e1")])
    hub.requests.clear()
    merge(tmp_path / "out", stream_from_hub=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "local-merge")
    size = len((family / "e0" / "model.safetensors").read_bytes())
    for ranges in spans(hub).values():
        header = ranges[0]
        assert header[0] == 0
        assert sum(stop - start for start, stop in ranges[1:]) > 1.9 * (size - 2000)


def test_adapters_are_so_small_that_they_are_downloaded_all_the_same(hub: HubServer, tmp_path: Path) -> None:
    folders = list(expert_dirs().values())[:2]
    for name, folder in zip(MODELS, folders):
        hub.add_repo(name, contents(folder))
    merge(tmp_path / "local-merge", [str(folder) for folder in folders])
    merge(tmp_path / "out", stream_from_hub=True)
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local-merge" / name).read_bytes()
    assert sum("range" not in request.headers for request in hub.sent("GET", "/lfs-storage/")) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_steps_of_sentence_transformers_come_along_and_the_rest_is_named(
    hub: HubServer, tmp_path: Path, stream: bool
) -> None:
    _, experts = write_family(tmp_path / "local", n=2)
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "pool", "type": "x.Pooling"}]
    files = {"modules.json": json.dumps(modules).encode(), "pool/config.json": b'{"pooling_mode": "cls"}'}
    left = {"value_head.safetensors": b"v" * 99, "tower/model.safetensors": b"t" * 99}
    for name, folder in zip(MODELS, experts):
        hub.add_repo(name, {**contents(Path(folder)), **files, **left})
    merged = merge(tmp_path / "out", stream_from_hub=stream)
    for name, data in files.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    assert merged.report["notes"] == [
        "Beside the weights these were left behind: tower/ of 'lab/e0', 'lab/e1'; value_head.safetensors of 'lab/e0', "
        "'lab/e1'."
    ]
    assert hub.sent("GET", r"value_head|tower") == []
    before = len(hub.requests)
    merge(tmp_path / "again", stream_from_hub=stream)
    if not stream and not OLD_CLIENT:
        assert len(hub.requests) - before == len(MODELS)  # from the cache: only the commits are asked for


@pytest.mark.parametrize(
    "fault",
    [
        {"times": 2, "status": 429, "headers": {"Retry-After": "7"}},
        {"times": 2, "status": 500},
        {"times": 2},  # the connection is lost
        {"times": 2, "after_bytes": 30},
        {"status": 403, "skip": 3},  # the signature of a link that was used before has expired
    ],
    ids=["rate limit", "failure", "lost", "cut short", "expired"],
)
def test_streaming_survives_passing_faults(
    hub: HubServer, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    monkeypatch.setattr("hf_frmerge.checkpoints.hub.folder._FIRST_BYTES", 100)
    merge(tmp_path / "local-merge", [str(family / "e0"), str(family / "e1")])
    hub.requests.clear()
    hub.fail("GET", "/lfs-storage/", **fault)
    merge(tmp_path / "out", stream_from_hub=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "local-merge")
    assert hub.faults[0].times == 0  # it struck
    if fault.get("status") == 429 and not OLD_CLIENT:
        assert waits == [8.0, 8.0]  # as the server said, and a second more


def test_a_hub_that_stays_down_ends_a_streamed_merge_that_can_be_resumed(
    hub: HubServer, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr("hf_frmerge.checkpoints.hub.folder._FIRST_BYTES", 100)
    merge(tmp_path / "local-merge", [str(family / "e0"), str(family / "e1")])
    hub.fail("GET", "/lfs-storage/", status=503, times=1000, skip=12)
    with pytest.raises(HubError, match=r"The Hub failed \(HTTP 503\) at lab/e[01]\. Try again later"):
        merge(tmp_path / "out", stream_from_hub=True)
    assert not (tmp_path / "out" / "config.json").exists()
    hub.faults.clear()
    merge(tmp_path / "out", stream_from_hub=True, resume_from_checkpoint=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "local-merge")


# Refused before anything is downloaded


def replace_file(hub: HubServer, repo_id: str, name: str, data: bytes) -> None:
    files = {n: blob.data for n, blob in hub.repos["models", repo_id].commit_of("main").files.items()}
    hub.add_repo(repo_id, {**files, name: data})


def wrong_shape(hub: HubServer, tmp_path: Path) -> None:
    tensors = random_model(7, torch.bfloat16)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(41, 24, dtype=torch.bfloat16)
    folder = write_model(tmp_path / "wrong", tensors)
    replace_file(hub, "lab/e1", "model.safetensors", Path(folder, "model.safetensors").read_bytes())


def no_derivatives(hub: HubServer, tmp_path: Path) -> None:
    replace_file(hub, "lab/e1", "README.md", b"---\nlicense: cc-by-nd-4.0\n---\n")


def gate(hub: HubServer, tmp_path: Path) -> None:
    hub.repos["models", "lab/e1"].gated = True


def pickles_only(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("lab/e1", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})


PROBLEMS: dict[str, tuple[Callable[[HubServer, Path], None], type[MergeError], str]] = {
    "shape": (wrong_shape, CheckpointError, r"up_proj"),
    "licence": (no_derivatives, MergeError, r"lab/e1 \(cc-by-nd-4.0\) does not allow derived works"),
    "gated": (gate, HubError, r"lab/e1 is gated: accept its terms at http.*/lab/e1, then log in"),
    "pickles": (pickles_only, CheckpointError, r"'lab/e1' has pickle weights only"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_cannot_be_merged_is_refused_before_the_download(
    hub: HubServer, family: Path, tmp_path: Path, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_frmerge.checkpoints.hub.folder._FIRST_BYTES", 1500)
    cause, error, message = PROBLEMS[problem]
    cause(hub, tmp_path)
    with pytest.raises(error, match=message):
        merge(tmp_path / "out")
    assert all("range" in request.headers for request in hub.sent("GET", "/lfs-storage/"))
    sizes = [stop - start for ranges in spans(hub).values() for start, stop in ranges]
    assert sum(sizes) <= 2 * 1500  # headers
    assert not (tmp_path / "out").exists()


def plan(*models: str) -> Result:
    return click_runner().invoke(main, ["plan", *models])


def test_plan_reads_headers_and_small_files_and_says_what_a_merge_would_do(
    hub: HubServer, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_frmerge.checkpoints.hub.folder._FIRST_BYTES", 1500)
    monkeypatch.chdir(tmp_path)
    result = plan("lab/e0", "lab/e1@main", "--base-model", "lab/base")
    assert result.exit_code == 0, result.stderr
    assert "8 tensors to merge" in result.stdout
    assert "to download from the Hub" in result.stdout
    assert sum(stop - start for ranges in spans(hub).values() for start, stop in ranges) <= 3 * 1500
    assert hub.sent("HEAD", ".*") == []
    small = {request.path.rpartition("/")[2] for request in hub.sent("GET", "/resolve/") if "range" in request.headers}
    assert small <= {"config.json", "README.md", "model.safetensors"}
    assert list((tmp_path / "cache").glob("*")) == []  # nothing is kept


@pytest.mark.parametrize("problem", PROBLEMS)
def test_plan_tells_what_would_fail(
    hub: HubServer, family: Path, tmp_path: Path, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cause, _, message = PROBLEMS[problem]
    cause(hub, tmp_path)
    result = plan(*MODELS)
    assert result.exit_code == 1
    assert re.search(message, result.stderr), result.stderr
    assert list((tmp_path / "cache").glob("*")) == []


def test_plan_tells_of_a_disk_that_is_too_small(
    hub: HubServer, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 5_000))
    result = plan(*MODELS)
    assert result.exit_code == 1
    assert "8 tensors to merge" in result.stdout  # the plan all the same
    assert "The download needs" in result.stderr


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(
    ("free", "message"),
    [(5_000, r"The download needs 0\.00 GB"), (25_000, r"download \(.*\) and the output \(.*\) share a disk")],
)
def test_disks_are_asked_first(
    hub: HubServer, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, message: str
) -> None:
    monkeypatch.setattr("hf_frmerge.checkpoints.hub.folder._FIRST_BYTES", 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, free))
    size = len((family / "e0" / "model.safetensors").read_bytes())
    assert size < 20_000 < 2 * size < 25_000 < 3 * size
    with pytest.raises(MergeError, match=message) as caught:
        merge(tmp_path / "out")
    assert "--stream-from-hub" in str(caught.value)
    assert max(stop - start for ranges in spans(hub).values() for start, stop in ranges) < size / 3
    if free > size:
        assert merge(tmp_path / "out", stream_from_hub=True).is_merged


# Found wherever they are


def test_a_renamed_model_is_known_by_its_new_name(
    hub: HubServer, family: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.rename("lab/e0", "lab/maths")
    merger = merge(tmp_path / "out")
    assert "lab/e0 is now called lab/maths on the Hub." in caplog.messages
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- lab/maths" in card and "lab/e0" not in card
    assert merger.state.sources[0]["revision"] == hub.repos["models", "lab/maths"].branches["main"]
    assert verify(str(tmp_path / "out")).ok


def test_long_lists_of_files_come_in_pages(hub: HubServer, family: Path, tmp_path: Path) -> None:
    hub.page_size = 3
    merge(tmp_path / "local-merge", [str(family / "e0"), str(family / "e1")])
    merge(tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "local-merge")
    assert hub.sent("GET", "/tree/.*cursor=3")


def test_shards_are_those_of_the_index(hub: HubServer, family: Path, tmp_path: Path) -> None:
    """Whatever their names; another set of weights beside them is not fetched."""
    tensors = load_file(family / "e0" / "model.safetensors")
    names = sorted(tensors)
    shards = {"part-a.safetensors": names[:3], "part-b.safetensors": names[3:]}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes((family / "e0" / "config.json").read_bytes())
    hub.add_repo("lab/sharded", {**contents(folder), "model.fp16.safetensors": b"the same in half precision"})
    merge(tmp_path / "local-merge", [str(family / "e0"), str(family / "e1")])
    merge(tmp_path / "out", ["lab/sharded", "lab/e1"])
    assert weights(tmp_path / "out") == weights(tmp_path / "local-merge")
    assert hub.sent("GET", "fp16") == []
