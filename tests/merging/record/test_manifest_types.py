"""Records read as types: what is written is read back whole, and so are records of version 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import ALICE_TOKEN
from merge_reference import SHAPES, random_model, write_family, write_model
from safetensors.numpy import save_file as save_table
from safetensors.torch import load_file
from xxhash import xxh3_128_hexdigest

from hf_frmerge import FisherRaoMerger, MergeCallback, MergingArguments
from hf_frmerge.errors import CheckpointError
from hf_frmerge.hub.card.describe import describe_merge
from hf_frmerge.kernels.elementwise import Band, Elementwise
from hf_frmerge.merging.record.checksums import sha256_of
from hf_frmerge.merging.record.manifest import Manifest, read_manifest
from hf_frmerge.merging.record.manifest_entries import RecordedTensor
from hf_frmerge.provenance.diff import diff_merges
from hf_frmerge.provenance.verify import verify

HEAD = "lm_head.weight"


class SkipNorms(MergeCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        control.should_skip_tensor = "norm" in state.current_tensor
        return control


def merge(
    experts: list[str], out: Path, base: str | None = None, callbacks: Any = None, **options: Any
) -> dict[str, Any]:
    args = MergingArguments(output_dir=str(out), disable_tqdm=True, **options)
    merger = FisherRaoMerger(experts, args, None, base, callbacks=callbacks).merge()
    assert merger.manifest == read_manifest(out)  # what card and terminal are told
    return json.loads((out / "merge_manifest.json").read_text())


OPTIONS: dict[str, dict[str, Any]] = {
    "measured, not all converged": {"block": "row", "max_iter": 1, "hub_token": ALICE_TOKEN},
    "skipped": {"callbacks": [SkipNorms]},
    "trimmed": {"method": "ties", "density": 0.4},
    "trimmed on both sides": {"method": "breadcrumbs"},
    "drawn": {"method": "dare_ties"},
    "drawn by rank": {"method": "della"},
    "selected by spread": {"method": "sce"},
    "agreed on": {"method": "consensus"},
    "as matrices": {"method": "swudi"},
    "given": {"coefficients": "merge_coefficients.safetensors"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_written_is_read_back_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = write_family(tmp_path)
    monkeypatch.chdir(tmp_path)
    save_table({tensor: np.array([[0.5, 0.25, 0.25]]) for tensor in SHAPES}, "merge_coefficients.safetensors")
    values = merge(experts, tmp_path / "out", base, space="deltas", **OPTIONS[name])
    manifest = read_manifest(tmp_path / "out")
    assert json.loads(json.dumps(manifest.to_dict())) == values
    assert list(manifest.to_dict()) == list(values)


def test_facts_are_where_their_types_say(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    values = merge(experts, tmp_path / "out", base, method="ties", density=0.4)
    manifest = read_manifest(tmp_path / "out")
    assert [model.id for model in manifest.models] == ["e0", "e1", "e2", "base"]
    assert [model.weight for model in manifest.models] == [pytest.approx(1 / 3)] * 3 + [None]
    decision = manifest.tensors[HEAD].decision
    assert isinstance(decision, Elementwise) and isinstance(decision.keep, Band)
    assert list(decision.keep.lower) == values["tensors"][HEAD]["decision"]["keep"]["lower"]
    assert manifest.tensors[HEAD].geometry is None and manifest.report.geometry is None
    assert manifest.report.n_merged == len(SHAPES) and manifest.report.output_dir is None


def version_2(folder: Path, experts: list[str]) -> dict[str, Any]:
    """
    Write the plain mean of two experts as version 2 recorded it.

    By torch and xxhash alone. A merged tensor of version 2 has no decision, and its arguments had other names.
    """
    folder.mkdir()
    sources = [load_file(Path(expert) / "model.safetensors") for expert in experts]
    mean = {name: (0.5 * sources[0][name].double() + 0.5 * sources[1][name].double()).float() for name in SHAPES}
    write_model(folder, mean)
    save_table({name: np.array([[0.5, 0.5]]) for name in SHAPES}, folder / "merge_coefficients.safetensors")
    weights = (folder / "model.safetensors").read_bytes()
    header = xxh3_128_hexdigest(weights[: 8 + int.from_bytes(weights[:8], "little")])

    def digest(tensor: torch.Tensor) -> str:
        return xxh3_128_hexdigest(tensor.contiguous().view(torch.uint8).numpy().tobytes())

    def entry(path: Path) -> dict[str, Any]:
        return {"size": path.stat().st_size, "sha256": sha256_of(path)}

    def tensor(name: str) -> dict[str, Any]:
        first, second = (source[name].double().flatten() for source in sources)
        norms = [float(first.norm()), float(second.norm())]
        angle = float(torch.arccos(first @ second / norms[0] / norms[1]))
        ratio = float((first + second).norm() / sum(norms))
        return {
            "action": "merge",
            "dtype": "F32",
            "shape": list(SHAPES[name]),
            "inputs_xxh3_128": {str(role): digest(source[name]) for role, source in enumerate(sources)},
            "output_xxh3_128": digest(mean[name]),
            "n_blocks": 1,
            "geometry": {
                "norms": norms, "norm_ratio": ratio, "linear_norm_ratio": ratio, "max_angle": angle,
                "mean_angle": angle, "gap_to_nre": 0.0, "n_iter": 0, "residual": 0.0, "unconverged": [],
                "n_ambiguous": 0, "pair_angles": [angle],
            },
        }  # fmt: skip

    tensors = {name: tensor(name) for name in SHAPES}
    angles = sorted(actual["geometry"]["max_angle"] for actual in tensors.values())
    ratios = sorted(actual["geometry"]["norm_ratio"] for actual in tensors.values())
    middle = {"angle": float(np.median(angles)), "ratio": float(np.median(ratios))}
    values = {
        "format_version": 2,
        "hf_frmerge": "0.0.9",
        "output_kind": "full",
        "method": "linear",
        "space": "weights",
        "arguments": {"method": "linear", "block": "tensor", "norm": "mean", "seed": 42, "hub_token": "<HUB_TOKEN>"},
        "experts": [
            {
                "id": Path(expert).name, "on_hub": False, "revision": None, "commit": None, "kind": "full",
                "files": {name: entry(Path(expert) / name) for name in ("model.safetensors", "config.json")},
                "weight": 0.5,
            }
            for expert in experts
        ],
        "base_model": None,
        "finished_at": "2026-11-25T12:00:00+00:00",
        "n_processes": 1,
        "machine": {"architecture": "x86_64", "system": "Linux"},
        "report": {
            "method": "linear", "space": "weights", "block": "tensor",
            "n_merged": len(SHAPES), "n_copied": 0, "n_skipped": 0,
            "max_angle": {"min": angles[0], "median": middle["angle"], "max": angles[-1]},
            "norm_ratio": {"min": ratios[0], "median": middle["ratio"]},
            "linear_norm_ratio": {"min": ratios[0], "median": middle["ratio"]},
            "gap_to_nre": {"median": 0.0, "max": 0.0},
            "n_iter": 0, "residual": 0.0, "n_not_converged": 0, "n_ambiguous": 0,
            "input_bytes": 2 * len(weights), "output_bytes": len(weights),
            "seconds": 1.0, "bytes_per_second": 2.0 * len(weights), "kernels": "native",
        },
        "versions": {"python": "3.11.7", "numpy": "2.4.6"},
        "notes": [],
        "files": {
            "model.safetensors": {"size": len(weights), "sha256": None, "header_xxh3_128": header},
            "config.json": entry(folder / "config.json"),
            "merge_coefficients.safetensors": entry(folder / "merge_coefficients.safetensors"),
        },
        "tensors": tensors,
    }  # fmt: skip
    (folder / "merge_manifest.json").write_text(json.dumps(values, indent=1) + "\n")
    places = {"models": [str(Path(expert).resolve()) for expert in experts], "marks": [{}, {}]}
    (folder / ".frmerge_sources.json").write_text(json.dumps(places) + "\n")
    return values


def test_a_record_of_version_2_is_read_verified_compared_and_described(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    old, new = tmp_path / "old", tmp_path / "new"
    values = version_2(old, experts)
    merge(experts, new, method="linear")
    manifest = read_manifest(old)
    assert manifest.tensors[HEAD].decision is None and manifest.tensors[HEAD].n_blocks == 1
    assert manifest.report.geometry is not None
    assert manifest.report.geometry.max_angle.max == values["report"]["max_angle"]["max"]

    report = verify(str(old))
    assert report.ok and report.checked_tensors == len(SHAPES)
    diff = diff_merges(str(old), str(new))
    assert (diff.n_tensors, diff.different_tensors, diff.n_coefficients, diff.n_thresholds) == (len(SHAPES), [], 0, 0)
    assert diff.sources == []
    card = describe_merge(old).read_text()
    assert f"{len(SHAPES)} tensors were merged" in card and "a plain weighted average" in card
    assert "A plain average keeps" in card

    # A checksum that follows later changes nothing else: the record stays one of version 2.
    assert verify(str(old), sha256=True).ok
    values["files"]["model.safetensors"]["sha256"] = sha256_of(old / "model.safetensors")
    assert json.loads((old / "merge_manifest.json").read_text()) == values


def test_a_changed_element_of_a_merge_of_version_2_is_found(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    version_2(tmp_path / "old", experts)
    data = bytearray((tmp_path / "old" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "old" / "model.safetensors").write_bytes(data)
    [problem] = verify(str(tmp_path / "old")).problems
    assert "differs from what its experts and coefficients give in 1 elements" in problem


def test_a_module_of_an_adapter_of_version_2_has_no_norm() -> None:
    entry = {
        "action": "merge", "dtype": "F32", "shape": [4, 4], "inputs_xxh3_128": {}, "output_xxh3_128": "",
        "n_blocks": 1, "rank": 2, "truncation_error": 0.125,
    }  # fmt: skip
    actual = RecordedTensor.from_dict(entry)
    assert (actual.rank, actual.norm, actual.truncation_error) == (2, None, 0.125)


def test_what_only_a_later_version_knows_is_passed_over_and_kept(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    values = merge(experts, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    values["weather"] = "fine"
    for place in ("report", "machine"):
        values[place]["weather"] = "fine"
    values["experts"][0]["weather"] = values["files"]["config.json"]["weather"] = "fine"
    values["tensors"][HEAD]["weather"] = values["tensors"][HEAD]["geometry"]["weather"] = "fine"
    values["files"]["config.json"]["sha256"] = None
    path = tmp_path / "out" / "merge_manifest.json"
    path.write_text(json.dumps(values))
    assert verify(str(tmp_path / "out"), sha256=True).ok
    assert read_manifest(tmp_path / "out") == manifest
    values["files"]["config.json"]["sha256"] = sha256_of(tmp_path / "out" / "config.json")
    assert json.loads(path.read_text()) == values


def test_a_record_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    experts = [write_model(tmp_path / f"e{seed}", random_model(seed)) for seed in range(2)]
    values = merge(experts, tmp_path / "out")
    path = tmp_path / "out" / "merge_manifest.json"

    def refused(changed: Any) -> str:
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError) as caught:
            read_manifest(tmp_path / "out")
        return str(caught.value)

    tensors = values["tensors"]
    assert "not what a merge writes (KeyError: 'tensors'). Restore" in refused(
        {name: value for name, value in values.items() if name != "tensors"}
    )
    assert "not what a merge writes" in refused(values | {"experts": 3})
    assert "not what a merge writes" in refused(values | {"report": {"max_angle": 1.0}})
    assert "not what a merge writes (ValueError: a decision of kind 'dice')" in refused(
        values | {"tensors": tensors | {HEAD: tensors[HEAD] | {"decision": {"kind": "dice"}}}}
    )
    assert "has format None" in refused([values])
    # The advice: a restored file is read.
    path.write_text(json.dumps(values))
    assert read_manifest(tmp_path / "out") == Manifest.from_dict(values)
