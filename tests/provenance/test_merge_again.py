"""A merge is made again from its record alone, pushed or not, and the answer whether it is the same is right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_server import ALICE_TOKEN, HubServer
from merge_reference import SHAPES, write_family
from safetensors.torch import load_file
from tiny_models import save_llama_family

from hf_frmerge import FisherRaoMerger, MergeCallback, MergingArguments
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.provenance.merge_again import reproduce


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `math`, `code`, and the adapters `lora0` and `lora1`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    root = tmp_path_factory.mktemp("family")
    save_llama_family(root, ["one", "two"], 0.05)
    for seed in range(2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        base = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        get_peft_model(base, lora).save_pretrained(root / f"lora{seed}", save_embedding_layers=False)
    return root


def merge(experts: list[str], out: Path, base: str | None = None, callbacks: Any = None, **options: Any) -> Path:
    args = MergingArguments(output_dir=str(out), disable_tqdm=True, **options)
    FisherRaoMerger(experts, args, [0.7, 0.3], base, callbacks=callbacks).merge()
    return out


def upload(hub: HubServer, folder: Path, repo_id: str) -> None:
    """As a push would: without the hidden file that knows local paths."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    hub.add_repo(repo_id, files)


KINDS = {
    "full": (["math", "code"], {"block": "row", "dtype": "float32"}, "model.safetensors"),
    "adapter": (["lora0", "lora1"], {"adapter_rank": 2}, "adapter_model.safetensors"),
    "mixed": (["math", "lora0"], {"beta": 0.5}, "model.safetensors"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pushed_merge_is_made_again_from_its_record(hub: HubServer, family: Path, tmp_path: Path, kind: str) -> None:
    experts, options, weights = KINDS[kind]
    for name in {*experts, "base"}:
        upload(hub, family / name, f"lab/{name}")
    out = merge([f"lab/{name}" for name in experts], tmp_path / "out", "lab/base", **options)
    upload(hub, out, "alice/merged")
    for name in experts:  # what the experts became since does not matter
        repo = hub.repos["models", f"lab/{name}"]
        old = repo.commit_of("main")
        repo.branches["main"] = repo.add_commit(old, "Emptied", {}).oid
    hub.requests.clear()
    again = tmp_path / "again"
    actual = reproduce("alice/merged", str(again))
    assert actual.identical and actual.differences == [] == actual.causes
    assert (again / weights).read_bytes() == (out / weights).read_bytes()
    assert not any(weights in request.path for request in hub.requests if "alice/merged" in request.path)
    assert reproduce("alice/merged").identical  # in a temporary folder


def test_local_experts_are_asked_for_by_name(hub: HubServer, tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    out = merge(experts, tmp_path / "out")
    assert reproduce(str(out)).identical  # known on this machine
    upload(hub, out, "alice/merged")
    with pytest.raises(CheckpointError, match=r"not known on this machine: e0, e1\. .*--expert NAME=PATH"):
        reproduce("alice/merged")
    with pytest.raises(ArgumentError, match=r"no expert 'e2': expected one of e0, e1"):
        reproduce("alice/merged", experts={"e2": [experts[0]]})
    places = {"e0": [experts[0]], "e1": [experts[1]]}
    assert reproduce("alice/merged", experts=places).n_tensors == len(SHAPES)
    swapped = reproduce("alice/merged", experts={"e0": places["e1"], "e1": places["e0"]})
    assert not swapped.identical
    assert len([line for line in swapped.differences if line.startswith("Tensor ")]) == len(SHAPES)
    assert [cause.partition(" is not what was merged")[0] for cause in swapped.causes] == ["e0", "e1"]


def test_two_experts_of_one_name_are_told_apart_by_their_order(tmp_path: Path) -> None:
    _, (first, second) = write_family(tmp_path, 2)
    places = [tmp_path / side / "expert" for side in ("left", "right")]
    for source, place in zip((first, second), places):
        shutil.copytree(source, place)
    out = merge([str(place) for place in places], tmp_path / "out")
    (out / ".frmerge_sources.json").unlink()
    assert reproduce(str(out), experts={"expert": [first, second]}).identical
    assert not reproduce(str(out), experts={"expert": [second, first]}).identical


def test_a_changed_bit_anywhere_is_found(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    out = merge(experts, tmp_path / "out")
    path = out / "merge_manifest.json"
    manifest = json.loads(path.read_text())
    digest = manifest["tensors"]["lm_head.weight"]["output_xxh3_128"]
    path.write_text(path.read_text().replace(digest, digest[::-1]))
    assert reproduce(str(out)).differences == ["Tensor 'lm_head.weight' differs."]
    path.write_text(json.dumps(manifest | {"versions": manifest["versions"] | {"numpy": "0.1"}}))
    actual = reproduce(str(out))
    assert actual.identical and len(actual.causes) == 1 and actual.causes[0].endswith(", then 0.1.")


class SkipHead(MergeCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        control.should_skip_tensor = state.current_tensor == "lm_head.weight"
        return control


def test_what_a_callback_skipped_is_skipped_again(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    out = merge(experts, tmp_path / "out", callbacks=[SkipHead])
    again = tmp_path / "again"
    assert reproduce(str(out), str(again)).identical
    head = load_file(again / "model.safetensors")["lm_head.weight"]
    assert (head == load_file(Path(experts[0]) / "model.safetensors")["lm_head.weight"]).all()


def test_a_folder_in_use_is_left_alone_whatever_the_merge_did(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    out = merge(experts, tmp_path / "out", overwrite=True)
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="not empty"):
        reproduce(str(out), str(used))


def test_arguments_of_a_later_version_are_named(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    out = merge(experts, tmp_path / "out")
    manifest = json.loads((out / "merge_manifest.json").read_text())
    manifest["arguments"]["curvature"] = 1
    (out / "merge_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not know: curvature"):
        reproduce(str(out))


def test_a_pushed_merge_with_a_token(hub: HubServer, tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    for folder in experts:
        upload(hub, Path(folder), f"alice/{Path(folder).name}")
        hub.repos["models", f"alice/{Path(folder).name}"].private = True
    out = merge(["alice/e0", "alice/e1"], tmp_path / "out", hub_token=ALICE_TOKEN)
    upload(hub, out, "alice/merged")
    assert reproduce("alice/merged", token=ALICE_TOKEN).identical
