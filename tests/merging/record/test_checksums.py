"""SHA-256 of every file: at once where that is cheap, else later, and never of a file that was not merged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from merge_reference import write_family

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.merging.record import checksums
from hf_frmerge.merging.record.write_manifest import record_checksums
from hf_frmerge.provenance.verify import verify

WEIGHTS = "model.safetensors"


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def merge(experts: list[str], out: Path, base: str | None = None, **options: Any) -> None:
    FisherRaoMerger(experts, MergingArguments(output_dir=str(out), disable_tqdm=True, **options), None, base).merge()


def manifest_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "merge_manifest.json").read_text())


@pytest.fixture
def large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "SMALL_FILE", 1000)  # of the files here, the configs


def test_small_files_are_hashed_by_the_merge(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 2)
    (Path(base) / "tokenizer_config.json").write_text("{}")
    (Path(experts[0]) / "tokenizer_config.json").write_text("{}")  # not taken, so not recorded
    out = tmp_path / "out"
    merge(experts, out, base, space="deltas", max_shard_size="8KB")
    actual = manifest_of(out)
    for folder, model in zip([*experts, base], [*actual["experts"], actual["base_model"]]):
        names = {WEIGHTS, "config.json"} | ({"tokenizer_config.json"} if folder == base else set())
        assert {name: entry["sha256"] for name, entry in model["files"].items()} == {
            name: sha256(Path(folder) / name) for name in names
        }
    written = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert set(actual["files"]) == written - {"README.md", "merge_manifest.json"}  # the index is among them
    assert "model.safetensors.index.json" in written
    assert all(entry["sha256"] == sha256(out / name) for name, entry in actual["files"].items())


def test_large_files_are_hashed_later(large_files: None, tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    out = tmp_path / "out"
    merge(experts, out)
    before = manifest_of(out)
    assert before["files"][WEIGHTS]["sha256"] is None and before["files"]["config.json"]["sha256"] is not None
    assert [e["files"][WEIGHTS]["sha256"] for e in before["experts"]] == [None, None]
    assert record_checksums(out) == []
    after = manifest_of(out)
    assert after["files"][WEIGHTS]["sha256"] == sha256(out / WEIGHTS)
    assert [e["files"][WEIGHTS]["sha256"] for e in after["experts"]] == [sha256(Path(e) / WEIGHTS) for e in experts]
    stamp = (out / "merge_manifest.json").stat().st_mtime_ns
    assert record_checksums(out) == [] and (out / "merge_manifest.json").stat().st_mtime_ns == stamp


def test_what_the_uploading_client_computed_is_taken(large_files: None, tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    out = tmp_path / "out"
    merge(experts, out)
    record_checksums(out, {WEIGHTS: "ab" * 32})
    assert manifest_of(out)["files"][WEIGHTS]["sha256"] == "ab" * 32


def test_a_file_that_was_rewritten_or_is_gone_gets_none(large_files: None, tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 3)
    out = tmp_path / "out"
    merge(experts, out)
    rewritten = Path(experts[0]) / WEIGHTS
    rewritten.write_bytes(rewritten.read_bytes())
    os.utime(rewritten, ns=(1, 1))
    (Path(experts[1]) / WEIGHTS).unlink()
    assert record_checksums(out) == [f"e0: {WEIGHTS}", f"e1: {WEIGHTS}"]
    actual = [expert["files"][WEIGHTS]["sha256"] for expert in manifest_of(out)["experts"]]
    assert actual == [None, None, sha256(Path(experts[2]) / WEIGHTS)]
    (out / ".frmerge_sources.json").unlink()
    assert record_checksums(out) == [f"e0: {WEIGHTS}", f"e1: {WEIGHTS}"]


def test_the_hub_names_large_files_by_it(large_files: None, hub: HubServer, tmp_path: Path, monkeypatch) -> None:
    _, experts = write_family(tmp_path, 2)
    for folder in experts:
        hub.add_repo(f"ann/{Path(folder).name}", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    merge(["ann/e0", "ann/e1"], tmp_path / "out")
    actual = [expert["files"][WEIGHTS]["sha256"] for expert in manifest_of(tmp_path / "out")["experts"]]
    assert actual == [sha256(Path(folder) / WEIGHTS) for folder in experts]


def test_verify_records_and_then_compares(large_files: None, tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    out = tmp_path / "out"
    merge(experts, out)
    assert verify(str(out)).ok and manifest_of(out)["files"][WEIGHTS]["sha256"] is None
    assert verify(str(out), sha256=True).ok and manifest_of(out)["files"][WEIGHTS]["sha256"] == sha256(out / WEIGHTS)
    manifest = manifest_of(out)
    manifest["files"][WEIGHTS]["sha256"] = "0" * 64
    (out / "merge_manifest.json").write_text(json.dumps(manifest))
    assert verify(str(out)).ok  # compared byte by byte by other means
    assert verify(str(out), sha256=True).problems == [f"File {WEIGHTS} was changed after the merge."]
    assert manifest_of(out) == manifest, "nothing is recorded of a model that is not as it was"
