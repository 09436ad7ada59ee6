"""Models whose weights are pickles, read only when asked for, against the same models as safetensors."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click_runner import click_runner
from hub_server import HubServer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import save_llama_family
from transformers import AutoModelForCausalLM

from hf_frmerge.checkpoints.tensors import pickles
from hf_frmerge.cli.main import main
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.planning.build_plan import build_plan

WORDS = [f"w{number}" for number in range(30)]
SPLIT = {"model.layers.0": "pytorch_model-00001-of-00002.bin", "model.layers.1": "pytorch_model-00002-of-00002.bin"}


def pickled(folder: Path, copy: Path, *, sharded: bool = False) -> None:
    """Copy a model, its weights as its class has them in memory: the output layer shares those of the embedding."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    if not sharded:
        torch.save(state, copy / "pytorch_model.bin")
        return
    files = {name: next((f for part, f in SPLIT.items() if part in name), SPLIT["model.layers.0"]) for name in state}
    for file in SPLIT.values():
        torch.save({name: tensor for name, tensor in state.items() if files[name] == file}, copy / file)
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with a family as safetensors, its experts as pickles, and a text."""
    monkeypatch.chdir(tmp_path)
    save_llama_family(tmp_path, WORDS, spread=0.3)
    pickled(Path("math"), Path("old-math"))
    pickled(Path("code"), Path("old-code"), sharded=True)
    Path("text.txt").write_text(" ".join(WORDS * 3))
    return tmp_path


def run(command: str, code: int = 0) -> str:
    result = click_runner().invoke(main, shlex.split(command))
    assert result.exit_code == code, result.stderr
    return result.stdout + result.stderr


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "model.safetensors"))


def test_they_merge_to_the_bits_of_safetensors(place: Path) -> None:
    run("merge math code --base-model base --space deltas --output-dir new")
    run("merge old-math old-code --base-model base --space deltas --allow-pickle --output-dir old")
    expected, actual = weights("new"), weights("old")
    assert actual.keys() == expected.keys()  # the base has no output layer of its own
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    recorded = json.loads(Path("old/merge_manifest.json").read_text())["experts"]
    assert {"pytorch_model.bin"} < recorded[0]["files"].keys()
    assert {*SPLIT.values(), "pytorch_model.bin.index.json"} < recorded[1]["files"].keys()
    assert all(file["sha256"] for expert in recorded for file in expert["files"].values())
    run("merge old-math old-code --allow-pickle --output-dir tied")
    merged = AutoModelForCausalLM.from_pretrained("tied")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, AutoModelForCausalLM.from_pretrained("old").lm_head.weight) is False


def test_without_the_option_none_is_opened_by_any_command(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("merge old-math old-code --allow-pickle --output-dir merged")
    load = torch.load

    def refuse(*args: object, **options: object) -> object:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", refuse)
    for command in (
        "merge old-math code --output-dir out",
        "plan old-math code",
        "inspect old-math code",
        "extract-lora old-math --base-model base --output-dir out",
        "evaluate old-math --data text.txt",
        "evaluate merged --data text.txt",
        "verify merged",
        "reproduce merged",  # the record allows it; who repeats it may not
    ):
        said = run(command, 1)
        assert re.search(r"'[^']*old-(math|code)' has pickle weights only \(pytorch_model", said), command
        assert "with --allow-pickle (allow_pickle)" in said
    monkeypatch.setattr(torch, "load", load)


def test_the_advice_works_for_every_command(place: Path) -> None:
    run("plan old-math code --allow-pickle")
    run("inspect old-math code --allow-pickle")
    run("merge old-math old-code --base-model base --space deltas --allow-pickle --output-dir merged")
    run("verify merged --allow-pickle --sha256")
    run("reproduce merged --allow-pickle")
    run("extract-lora old-math --base-model base --output-dir lora --allow-pickle")
    said = run("evaluate old-math --experts old-code --data text.txt --no-generate --no-cache --allow-pickle --json")
    assert {score["model"] for score in json.loads(said[: said.rindex("}") + 1])["scores"]} == {"merged", "old-code"}


def test_an_altered_pickle_is_found(place: Path) -> None:
    run("merge old-math old-code --base-model base --space deltas --allow-pickle --output-dir merged")
    state = torch.load("old-math/pytorch_model.bin", weights_only=True)
    state["model.norm.weight"] += 1
    torch.save(state, "old-math/pytorch_model.bin")
    said = run("verify merged --allow-pickle", 1)
    assert "'model.norm.weight' differs" in said


def test_adapters(place: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained("base")
    for seed, name in enumerate(("x", "y")):
        torch.manual_seed(seed)
        adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapter.save_pretrained(name)
        base = adapter.unload()
    run("merge x y --base-model base --output-dir new")
    Path("old").mkdir()
    Path("old/adapter_config.json").write_bytes(Path("x/adapter_config.json").read_bytes())
    torch.save(load_file("x/adapter_model.safetensors"), "old/adapter_model.bin")
    said = run("merge old y --base-model base --output-dir merged", 1)
    assert "'old' has pickle weights only (adapter_model.bin)" in said
    run("merge old y --base-model base --output-dir merged --allow-pickle")
    expected, actual = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("new", "merged"))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_pickles_under_other_names(place: Path) -> None:
    Path("old-math/pytorch_model.bin").rename("old-math/weights.pt")
    said = run("merge old-math code --output-dir out --allow-pickle", 1)
    assert "(weights.pt), under names that transformers does not load" in said
    Path("old-math/weights.pt").rename(re.search(r"call it (\S+) and pass", said)[1].join(("old-math/", "")))
    run("merge old-math code --output-dir out --allow-pickle")


def test_safetensors_are_taken_where_there_are_both(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("math/pytorch_model.bin").write_bytes(b"no pickle")
    run("merge math code --output-dir out --allow-pickle")


def test_on_the_hub(place: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "cache"))
    for name in ("old-math", "old-code"):
        hub.add_repo(f"lab/{name}", {path.name: path.read_bytes() for path in Path(name).iterdir()})
    with pytest.raises(CheckpointError, match="'lab/old-math' has pickle weights only"):
        build_plan(["lab/old-math", "lab/old-code"], MergingArguments())
    assert hub.sent("GET", r"\.bin|lfs") == []
    run("merge math code --output-dir new")
    run("merge lab/old-math lab/old-code --output-dir old --allow-pickle")
    run("merge lab/old-math lab/old-code --output-dir again --allow-pickle")  # from the cache
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "empty"))
    run("merge lab/old-math lab/old-code --output-dir streamed --allow-pickle --stream-from-hub")
    assert not list(Path("empty").rglob("*.bin"))
    for folder in ("old", "again", "streamed"):
        assert all(torch.equal(weights(folder)[name], tensor) for name, tensor in weights("new").items())


def test_torch_that_does_not_say_where_they_lie(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_describe", lambda opened: torch.load(opened, weights_only=True))
    said = run("merge old-math code --output-dir out --allow-pickle", 1)
    assert "is read with torch 2.7 or later: pip install -U torch" in said
