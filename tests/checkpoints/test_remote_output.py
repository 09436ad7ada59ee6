"""Outputs behind URLs, in fsspec's memory and local file systems."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from merge_reference import random_model, write_model

from hf_frmerge import FisherRaoMerger
from hf_frmerge.checkpoints.remote_output import local_folder, url_of
from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

URL = "memory://frmerge-out/models/merged"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    store = fsspec.filesystem("memory")
    yield store
    if store.exists("/frmerge-out"):
        store.rm("/frmerge-out", recursive=True)


@pytest.fixture
def experts(tmp_path: Path) -> list[str]:
    experts = [write_model(tmp_path / f"e{i}", random_model(i, torch.bfloat16)) for i in range(2)]
    (Path(experts[0]) / "additional_chat_templates").mkdir()
    (Path(experts[0]) / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    return experts


def merge(experts: list[str], output_dir: str, **options: Any) -> str:
    args = MergingArguments(output_dir=output_dir, report_to="none", disable_tqdm=True, **options)
    FisherRaoMerger(experts, args).merge()
    return args.output_dir


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_a_url_and_its_folder_lead_to_each_other(store: Any) -> None:
    for url in (URL, "s3://bucket/a b/m", "s3://bucket/m", "gs://b/c/../100%25/m"):
        assert url_of(local_folder(url)) == url
        assert local_folder(url + "/") == local_folder(url)
    assert url_of("merged") is url_of("/tmp/a%3A%2F%2Fb/m") is None
    assert local_folder("file:///a/b") == "/a/b"


def test_the_config_arrives_last_and_everything_arrives(
    store: Any, experts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order, put = [], MemoryFileSystem.put_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "put_file",
        lambda self, path, target, **o: (order.append(target), put(self, path, target, **o)),
    )
    folder = merge(experts, URL)
    expected = files(Path(folder))
    assert {"model.safetensors", "README.md", "merge_manifest.json", "additional_chat_templates/tool.jinja"} < set(
        expected
    )
    actual = store.find("/frmerge-out")
    assert {path.removeprefix("/frmerge-out/models/merged/"): store.cat_file(path) for path in actual} == expected
    assert order[-1].endswith("/config.json")


def test_a_model_that_is_there_is_replaced_only_when_asked_for(store: Any, experts: list[str]) -> None:
    merge(experts, URL)
    Path(local_folder(URL)).rename(Path(local_folder(URL)).with_name("moved"))  # as if from another machine
    with pytest.raises(ArgumentError, match=r"There is a model at memory://frmerge-out/models/merged"):
        merge(experts, URL)
    merge(experts, URL, overwrite=True, max_shard_size="4KB")
    names = {path.rpartition("/")[2] for path in store.find("/frmerge-out")}
    assert "model.safetensors" not in names and "model-00001-of-00004.safetensors" in names


def test_a_store_that_fails_leaves_no_model_there_and_a_whole_one_here(
    store: Any, experts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(experts, URL)
    put = MemoryFileSystem.put_file

    def fail(self: Any, path: str, target: str, **options: Any) -> None:
        if target.endswith(".safetensors"):
            raise ConnectionError("the line is down")
        put(self, path, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", fail)
    with pytest.raises(
        MergeError, match=r"ConnectionError: the line is down. It is finished in .*: copy it"
    ) as caught:
        merge(experts, URL, overwrite=True)
    assert not store.exists("/frmerge-out/models/merged/config.json")
    assert local_folder(URL) in str(caught.value)
    assert (Path(local_folder(URL)) / "config.json").exists()


def test_a_file_url_is_a_folder(store: Any, experts: list[str], tmp_path: Path) -> None:
    assert merge(experts, f"file://{tmp_path}/out") == f"{tmp_path}/out"
    assert (tmp_path / "out" / "config.json").exists()


def test_an_unknown_protocol_is_refused_before_the_merge(store: Any, experts: list[str]) -> None:
    with pytest.raises(ArgumentError, match="Cannot write to 'nowhere://x/m'"):
        merge(experts, "nowhere://x/m")
    assert not Path(local_folder("nowhere://x/m")).exists()
