"""From the Hub to the Hub and back by the real clients: merge, push, load, verify, and what was tampered with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from click_runner import click_runner
from hub_server import ALICE_TOKEN, HubServer
from tiny_models import save_llama_family
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.cli.main import main
from hf_frmerge.evaluation.models.merged import load_merged

WORDS = ["what", "one", "says", "the", "other", "hears"]
REPO = "alice/merged"


@pytest.fixture
def pushed(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Merge of `lab/math` and `lab/code`, in several shards, pushed to `alice/merged`; nothing else is local."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    save_llama_family(tmp_path / "models", WORDS, spread=0.1)
    for name in ("math", "code"):
        folder = tmp_path / "models" / name
        hub.add_repo(f"lab/{name}", {path.name: path.read_bytes() for path in folder.iterdir()}, private=True)
    args = MergingArguments(
        output_dir=str(tmp_path / "out"), max_shard_size="3KB", hub_token=ALICE_TOKEN, disable_tqdm=True
    )
    FisherRaoMerger(["lab/math", "lab/code"], args, [0.7, 0.3]).merge().push_to_hub(REPO)
    monkeypatch.setenv("HF_TOKEN", ALICE_TOKEN)  # the experts are private
    return tmp_path / "out"


def frmerge(*arguments: str) -> Result:
    return click_runner().invoke(main, list(arguments))


def replace_on_hub(hub: HubServer, name: str, data: bytes | None) -> None:
    repo = hub.repos["models", REPO]
    files = dict(repo.commit_of("main").files)
    old = files.pop(name)
    if data is not None:
        files[name] = replace(old, data=data)
        hub.lfs[files[name].sha256] = data
    repo.branches["main"] = repo.add_commit(repo.commit_of("main"), "Tamper", files).oid


def test_transformers_loads_what_was_merged(hub: HubServer, pushed: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(REPO)("the other says what one hears", return_tensors="pt")
    from_hub = AutoModelForCausalLM.from_pretrained(REPO)
    assert len(list(pushed.glob("model-*.safetensors"))) > 2
    local = load_merged(str(pushed), None, None)
    assert from_hub.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(from_hub(**tokens).logits, local(**tokens).logits)


def test_verify_from_the_hub(hub: HubServer, pushed: Path) -> None:
    hub.requests.clear()
    result = frmerge("verify", REPO, "--json")
    assert result.exit_code == 0, result.stderr
    actual = json.loads(result.stdout)
    assert actual["ok"] and actual["checked_tensors"] == 20
    commits = {f"lab/{name}": hub.repos["models", f"lab/{name}"].branches["main"] for name in ("math", "code")}
    for repo_id, commit in commits.items():  # the experts are asked for by the commit in the manifest
        asked = {request.path for request in hub.sent("GET", f"/api/models/{repo_id}(/revision/.*)?$")}
        assert asked == {f"/api/models/{repo_id}/revision/{commit}"}


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00004.safetensors", "merge_coefficients.safetensors"])
def test_verify_finds_what_was_changed_on_the_hub(hub: HubServer, pushed: Path, name: str) -> None:
    names = hub.repos["models", REPO].commit_of("main").files
    name = next(n for n in sorted(names) if n.startswith(name.split("-of-")[0]))
    data = names[name].data
    replace_on_hub(hub, name, data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    result = frmerge("verify", REPO)
    assert result.exit_code == 1
    assert "problem" in result.output
    if name.startswith("model-"):
        assert "differs from what its experts and coefficients give" in result.output
    elif name == "config.json":
        assert "config.json" in result.output


def test_verify_finds_what_was_deleted_from_the_hub(hub: HubServer, pushed: Path) -> None:
    replace_on_hub(hub, "merge_coefficients.safetensors", None)
    result = frmerge("verify", REPO)
    assert result.exit_code == 1
    assert "File merge_coefficients.safetensors is missing." in result.output


def test_verify_follows_a_revision(hub: HubServer, pushed: Path) -> None:
    good = hub.repos["models", REPO].branches["main"]
    replace_on_hub(hub, "config.json", b"{}")
    assert frmerge("verify", f"{REPO}@{good}").exit_code == 0
    assert frmerge("verify", REPO).exit_code == 1
