"""Records of real merges against the JSON schema that ships with the package, and records that it must refuse."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hub_server import ALICE_TOKEN, HubServer
from jsonschema import Draft202012Validator
from merge_reference import write_family
from tiny_models import save_llama_family

from hf_frmerge import FisherRaoMerger, MergeCallback, MergingArguments
from hf_frmerge.merging.record.manifest import FORMAT_VERSION, SCHEMA_FILE
from hf_frmerge.methods.table import METHODS

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    text = files("hf_frmerge.merging.record").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")
    actual = json.loads(text)
    Draft202012Validator.check_schema(actual)
    return Draft202012Validator(actual, format_checker=Draft202012Validator.FORMAT_CHECKER)


def merge(experts: list[str], out: Path, base: str | None = None, callbacks: Any = None, **options: Any) -> Manifest:
    args = MergingArguments(output_dir=str(out), disable_tqdm=True, hub_token=ALICE_TOKEN, **options)
    FisherRaoMerger(experts, args, None, base, callbacks=callbacks).merge()
    return json.loads((out / "merge_manifest.json").read_text())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    root = tmp_path_factory.mktemp("adapters")
    save_llama_family(root, ["one", "two"], 0.05)
    for seed in range(2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), lora).save_pretrained(root / f"lora{seed}")
    return root


class SkipNorms(MergeCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        control.should_skip_tensor = "norm" in state.current_tensor
        return control


def test_methods_without_coefficients_are_those_of_the_table(schema: Draft202012Validator) -> None:
    without = schema.schema["if"]["properties"]["method"]["enum"]
    assert without == [method.name for method in METHODS.values() if method.kind in ("sparse", "spectral")]


@pytest.mark.parametrize("method", ["dare_linear", "tsv_m"])
def test_a_merge_without_coefficients(schema: Draft202012Validator, tmp_path: Path, method: str) -> None:
    base, experts = write_family(tmp_path)
    actual = merge(experts, tmp_path / "out", base, method=method)
    assert [error.message for error in schema.iter_errors(actual)] == []


def test_a_merge_of_full_models(schema: Draft202012Validator, tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    actual = merge(experts, tmp_path / "out", base, space="deltas", block="row", max_iter=1)
    assert actual["format_version"] == FORMAT_VERSION == schema.schema["properties"]["format_version"]["const"]
    assert schema.schema["$id"].endswith(f":{FORMAT_VERSION}")
    assert [error.message for error in schema.iter_errors(actual)] == []
    rows = actual["tensors"]["lm_head.weight"]["geometry"]["unconverged"]
    assert len(rows) == 48 and actual["report"]["n_not_converged"] >= len(
        rows
    )  # one step is not enough at wide angles


def test_a_merge_of_adapters_and_a_mixed_one(schema: Draft202012Validator, adapters: Path, tmp_path: Path) -> None:
    loras, base = [str(adapters / "lora0"), str(adapters / "lora1")], str(adapters / "base")
    adapter = merge(loras, tmp_path / "adapter", base, adapter_rank=2)
    mixed = merge([str(adapters / "math"), loras[0]], tmp_path / "mixed", base, [SkipNorms])
    assert {entry["action"] for entry in mixed["tensors"].values()} == {"merge", "skip"}
    assert (adapter["output_kind"], mixed["output_kind"]) == ("adapter", "full")
    for actual in (adapter, mixed):
        assert [error.message for error in schema.iter_errors(actual)] == []


def test_models_of_the_hub(schema: Draft202012Validator, hub: HubServer, tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    for folder in experts:
        hub.add_repo(f"ann/{Path(folder).name}", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    actual = merge(["ann/e0", "ann/e1@main"], tmp_path / "out")
    assert [error.message for error in schema.iter_errors(actual)] == []


def remove(*path: str | int) -> Callable[[Manifest], None]:
    def change(manifest: Any) -> None:
        for part in path[:-1]:
            manifest = manifest[part]
        del manifest[path[-1]]

    return change


def put(value: Any, *path: str | int) -> Callable[[Manifest], None]:
    def change(manifest: Any) -> None:
        for part in path[:-1]:
            manifest = manifest[part]
        manifest[path[-1]] = value

    return change


HEAD = "lm_head.weight"
REFUSED = {
    "another format": put(1, "format_version"),
    "no versions": remove("versions"),
    "no device": remove("arguments", "device"),
    "a token": put(ALICE_TOKEN, "arguments", "hub_token"),
    "a folder": put("/home/ann/out", "arguments", "output_dir"),
    "a path for a name": put("/home/ann/e0", "experts", 0, "id"),
    "an address for a name": put("s3://bucket/e0", "experts", 0, "id"),
    "no weight of an expert": remove("experts", 0, "weight"),
    "no expert": lambda manifest: manifest["experts"].__delitem__(slice(None)),
    "a commit of a local model": put("a" * 40, "experts", 0, "commit"),
    "no commit of a model on the Hub": put(True, "experts", 0, "on_hub"),
    "no checksum of an input": remove("experts", 0, "files", "model.safetensors", "sha256"),
    "half a checksum": put("ab", "files", "config.json", "sha256"),
    "no coefficients": remove("files", "merge_coefficients.safetensors"),
    "no digest of a tensor": put("", "tensors", HEAD, "output_xxh3_128"),
    "no decision for a merged tensor": remove("tensors", HEAD, "decision"),
    "a decision nobody knows": put({"kind": "dice"}, "tensors", HEAD, "decision"),
    "convergence of no block": put([-1], "tensors", HEAD, "geometry", "unconverged"),
    "an angle beyond pi": put(3.2, "tensors", HEAD, "geometry", "max_angle"),
    "a copy of nothing": put("copy", "tensors", HEAD, "action"),
    "a key nobody knows": put(1, "tensors", HEAD, "extra"),
    "a local time": put("2026-11-25T12:00:00", "finished_at"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("good")
    return merge(write_family(root, 2)[1], root / "out")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_record_is_refused(schema: Draft202012Validator, good: Manifest, name: str) -> None:
    changed = copy.deepcopy(good)
    REFUSED[name](changed)
    assert schema.is_valid(good) and not schema.is_valid(changed)
