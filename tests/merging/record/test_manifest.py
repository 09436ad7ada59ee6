"""The record of a merge says everything, tells nothing private, and is enough to make the merge again."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import ALICE_TOKEN, HubServer
from merge_reference import SHAPES, random_model, write_family, write_model
from safetensors.torch import load_file
from xxhash import xxh3_128_hexdigest

from hf_frmerge import FisherRaoMerger, MergingArguments, __version__
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.planning.coefficient_table import read_coefficients
from hf_frmerge.merging.record.manifest import read_manifest


def merge(
    experts: list[str], out: Path, weights: list[float] | None = None, base: str | None = None, **options: Any
) -> dict[str, Any]:
    args = MergingArguments(output_dir=str(out), disable_tqdm=True, **options)
    FisherRaoMerger(experts, args, weights, base).merge()
    return json.loads((out / "merge_manifest.json").read_text())


def tensor_bytes(folder: Path | str, name: str) -> bytes:
    return load_file(Path(folder) / "model.safetensors")[name].contiguous().view(torch.uint8).numpy().tobytes()


def entry_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_models_on_the_hub_are_pinned_to_their_commits(hub: HubServer, tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 2)
    repos = {}
    for folder in [*experts, base]:
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        repos[Path(folder).name] = hub.add_repo(f"ann/{Path(folder).name}", files)
    old = repos["e0"].branches["main"]
    newer = repos["e0"].add_commit(repos["e0"].commit_of("main"), "newer", dict(repos["e0"].commit_of("main").files))
    repos["e0"].branches["main"], repos["e0"].branches["v1"] = newer.oid, old
    actual = merge(["ann/e0@v1", "ann/e1"], tmp_path / "out", [3, 1], "ann/base", hub_token=ALICE_TOKEN)
    common = {"on_hub": True, "kind": "full"}
    files = [
        {name: entry_of(Path(folder) / name) for name in ("model.safetensors", "config.json")} for folder in experts
    ]
    assert actual["experts"] == [
        {"id": "ann/e0", "revision": "v1", "commit": old, "weight": 0.75, "files": files[0]} | common,
        {"id": "ann/e1", "revision": None, "commit": repos["e1"].branches["main"], "weight": 0.25, "files": files[1]}
        | common,
    ]
    head = repos["base"].branches["main"]
    assert {name: actual["base_model"][name] for name in ("id", "revision", "commit")} == {
        "id": "ann/base", "revision": None, "commit": head,
    }  # fmt: skip
    assert ALICE_TOKEN not in (tmp_path / "out" / "merge_manifest.json").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert ALICE_TOKEN not in card and old in card


def test_arguments_versions_and_totals(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path)
    options = {"method": "nre", "norm": "median", "beta": 0.5, "block": "row", "run_name": "r"}
    actual = merge(experts, tmp_path / "out", [1, 1, 2], **options)
    assert {name: actual["arguments"][name] for name in options} == options
    assert actual["arguments"]["hub_token"] == "<HUB_TOKEN>"
    assert (actual["format_version"], actual["method"], actual["space"], actual["output_kind"]) == (
        3, "nre", "weights", "full",
    )  # fmt: skip
    # What was recorded makes the same arguments again.
    again = MergingArguments(**{k: v for k, v in actual["arguments"].items() if k != "hub_token"})
    assert again.to_dict() | {"output_dir": ""} == actual["arguments"] | {"output_dir": ""}
    assert actual["hf_frmerge"] == __version__
    assert actual["versions"] == {"python": platform.python_version()} | {
        name: version(name)
        for name in ("numpy", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")
    }
    assert [expert["weight"] for expert in actual["experts"]] == [0.25, 0.25, 0.5]
    assert actual["base_model"] is None and actual["n_processes"] == 1
    report = actual["report"]
    assert (report["n_merged"], report["n_copied"], report["n_not_converged"]) == (len(SHAPES), 0, 0)
    assert report["kernels"].startswith(("native", "torch"))


def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 2, torch.bfloat16)
    out = tmp_path / "out"
    actual = merge(experts, out, base=base, space="deltas")
    for name in SHAPES:
        entry = actual["tensors"][name]
        roles = {"-1": base, "0": experts[0], "1": experts[1]}
        inputs = {role: xxh3_128_hexdigest(tensor_bytes(folder, name)) for role, folder in roles.items()}
        assert entry["inputs_xxh3_128"] == inputs
        assert entry["output_xxh3_128"] == xxh3_128_hexdigest(tensor_bytes(out, name))
        assert (entry["action"], entry["dtype"], entry["shape"]) == ("merge", "BF16", list(SHAPES[name]))
    weights = (out / "model.safetensors").read_bytes()
    header = weights[: 8 + int.from_bytes(weights[:8], "little")]
    assert actual["files"]["model.safetensors"].pop("header_xxh3_128") == xxh3_128_hexdigest(header)
    assert set(actual["files"]) == {"model.safetensors", "config.json", "merge_coefficients.safetensors"}
    assert actual["files"] == {name: entry_of(out / name) for name in actual["files"]}


def test_copies_say_where_they_come_from(tmp_path: Path) -> None:
    experts = []
    for i in range(2):
        extra = {"position_ids": torch.arange(7) + i}
        experts.append(write_model(tmp_path / f"e{i}", random_model(i) | extra))
    entry = merge(experts, tmp_path / "out")["tensors"]["position_ids"]
    digest = xxh3_128_hexdigest(tensor_bytes(experts[0], "position_ids"))
    assert entry == {
        "action": "copy", "dtype": "I64", "shape": [7], "donor": 0,
        "inputs_xxh3_128": {"0": digest}, "output_xxh3_128": digest,
    }  # fmt: skip
    assert "position_ids" not in read_coefficients(tmp_path / "out").rows


@pytest.mark.parametrize("relative", [False, True])
def test_no_local_path_is_told(tmp_path: Path, relative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home" / "ann"
    _, experts = write_family(home / "drafts")
    for i, expert in enumerate(experts):  # disagreements and repetitions make notes that name the models
        config = json.loads((Path(expert) / "config.json").read_text())
        (Path(expert) / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0 + i}))
    if relative:
        monkeypatch.chdir(home)
        experts = [str(Path(expert).relative_to(home)) for expert in experts]
    out = home / "out"
    actual = merge([*experts, experts[0]], out, run_name="r")
    assert [expert["id"] for expert in actual["experts"]] == ["e0", "e1", "e2", "e0"]
    assert any("rope_theta" in note and "'e0'" in note for note in actual["notes"])
    assert any("listed twice" in note for note in actual["notes"])
    for path in out.iterdir():
        if not path.name.startswith("."):
            content = path.read_bytes()
            assert str(home).encode() not in content and b"drafts" not in content, path.name
    # The one file that knows is hidden, and never pushed.
    sources = json.loads((out / ".frmerge_sources.json").read_text())["models"]
    assert sources == [str(home / "drafts" / name) for name in ("e0", "e1", "e2", "e0")]


@pytest.mark.parametrize(
    ("space", "block", "dtype"),
    [
        ("weights", "tensor", torch.bfloat16),
        ("weights", "row", torch.float16),
        ("deltas", "tensor", torch.bfloat16),
        ("deltas", "head", torch.float32),
        ("deltas", "model", torch.float16),
    ],
)
def test_coefficients_and_experts_give_the_model_bit_for_bit(
    tmp_path: Path, space: str, block: str, dtype: torch.dtype
) -> None:
    """By torch alone: sum in float64, base first, in the order of the experts; rounded once."""
    base, experts = write_family(tmp_path, 3, dtype)
    out = tmp_path / "out"
    merge(experts, out, [0.5, 0.3, 0.2], base, space=space, block=block)
    table = read_coefficients(out).rows
    merged, origin = load_file(out / "model.safetensors"), load_file(Path(base) / "model.safetensors")
    sources = [load_file(Path(expert) / "model.safetensors") for expert in experts]
    for name in SHAPES:
        coefficients = table[name]
        blocks = len(coefficients)
        columns = [(s[name].double().reshape(blocks, -1), coefficients[:, i]) for i, s in enumerate(sources)]
        if space == "deltas":
            columns.insert(0, (origin[name].double().reshape(blocks, -1), 1.0 - coefficients.sum(axis=1)))
        total = torch.zeros_like(columns[0][0])
        for values, column in columns:
            total += values * torch.from_numpy(np.ascontiguousarray(column))[:, None]
        assert merged[name].dtype == dtype
        derived = round_once(total, dtype).reshape(merged[name].shape)
        assert torch.equal(derived, merged[name]), name


def round_once(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nearest, ties to even; torch itself rounds float64 to 16 bits by way of float32, which is twice."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    mantissa, exponent = torch.frexp(values)
    values = torch.ldexp(torch.round(mantissa * 2**bits) / 2**bits, exponent)  # no subnormals here
    return values.to(dtype)


def test_reading_refuses_what_is_not_a_record(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no merge_manifest.json"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=r"no table of coefficients .*merge_coefficients.safetensors"):
        read_coefficients(tmp_path)
    (tmp_path / "merge_coefficients.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"merge_coefficients.safetensors is damaged"):
        read_coefficients(tmp_path)
    (tmp_path / "merge_manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has format None, this version reads 2"):
        read_manifest(tmp_path)
    (tmp_path / "merge_manifest.json").write_text('{"format_version"')
    with pytest.raises(CheckpointError, match=r"merge_manifest.json is not valid JSON"):
        read_manifest(tmp_path)
