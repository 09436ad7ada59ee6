from __future__ import annotations

import base64
import getpass
import hashlib
import json
import tempfile
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from card_examples import full
from hub_server import ALICE_TOKEN, HubServer
from hub_server.state import Collection
from huggingface_hub import HfApi, ModelCard, create_repo, model_info, snapshot_download
from merge_reference import random_model, write_model
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file
from tiny_models import save_llama_family
from transformers import AutoModelForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.checkpoints.lock import refuse_while_merging
from hf_frmerge.demo.texts import expert_dirs
from hf_frmerge.errors import ArgumentError, HubError, MergeError
from hf_frmerge.hub.push import full_repo_id, push_folder
from hf_frmerge.merging.callbacks.callback import MergeCallback
from hf_frmerge.provenance.verify import verify

REPO = "alice/reader-135m"


def push(output_dir: Path, **kwargs):
    return push_folder(output_dir, **{"repo_id": REPO, "token": ALICE_TOKEN, **kwargs})


def commits(hub: HubServer, repo_id: str = REPO) -> list[str]:
    return [commit.title for commit in hub.repos["models", repo_id].commits.values()]


def test_push_arrives_whole_in_one_commit(hub: HubServer, output_dir: Path, tmp_path: Path):
    info = push(output_dir, commit_message="Merge")
    assert commits(hub) == ["initial commit", "Merge"]
    remote = model_info(REPO, token=False)
    assert remote.sha == info.oid
    assert remote.card_data.base_model == ["ann/austen-135m", "ann/bible-135m"]
    copy = Path(snapshot_download(REPO, local_dir=tmp_path / "copy", token=False))
    for path in output_dir.iterdir():
        if not path.name.startswith("."):
            assert (copy / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("blocking", [True, False])
def test_no_merge_writes_to_the_folder_until_all_is_sent(
    hub: HubServer, output_dir: Path, monkeypatch: pytest.MonkeyPatch, blocking: bool
):
    send, refused = HfApi.create_commit, []

    def create_commit(*args, **kwargs):
        with pytest.raises(MergeError, match="Another merge or push is at work"):
            refuse_while_merging(output_dir)
        refused.append(True)
        return send(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    pushed = push(output_dir, blocking=blocking)
    if isinstance(pushed, Future):
        pushed.result()
    assert refused and len(commits(hub)) == 2
    refuse_while_merging(output_dir)


def test_card_read_back_from_the_hub_says_what_was_written(hub: HubServer, output_dir: Path):
    push(output_dir)
    data = ModelCard.load(REPO, token=False).data
    assert data.base_model == ["ann/austen-135m", "ann/bible-135m"]
    assert data.base_model_relation == "merge"
    expected = {(s.domain, "loss"): s.metrics["loss"] for s in full().evaluation.scores if s.model == "merged"}
    got = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert expected.items() <= got.items()


def test_second_push_of_the_same_files_makes_no_commit(hub: HubServer, output_dir: Path):
    first = push(output_dir)
    uploads = len(hub.sent("PUT", "/lfs-storage/"))
    second = push(output_dir)
    assert second.oid == first.oid
    assert len(commits(hub)) == 2
    assert len(hub.sent("PUT", "/lfs-storage/")) == uploads == 2


def test_a_name_without_namespace_is_the_user_s(hub: HubServer, output_dir: Path):
    push(output_dir, repo_id="plain")
    assert ("models", "alice/plain") in hub.repos


def test_full_repo_id(hub: HubServer):
    assert full_repo_id("plain", ALICE_TOKEN) == "alice/plain"
    assert full_repo_id("lab/plain", None) == "lab/plain"
    for token in (None, "wrong-token"):
        with pytest.raises(HubError, match="hf auth login") as caught:
            full_repo_id("plain", token)
        assert "wrong-token" not in str(caught.value)


@pytest.mark.parametrize("private", [True, False, None])
def test_private_repositories(hub: HubServer, output_dir: Path, private: bool | None):
    push(output_dir, private=private)
    assert hub.repos["models", REPO].private is bool(private)


def test_branch(hub: HubServer, output_dir: Path):
    main = create_repo(REPO, token=ALICE_TOKEN) and model_info(REPO, token=ALICE_TOKEN).sha
    info = push(output_dir, revision="v2")
    assert model_info(REPO, revision="v2", token=False).sha == info.oid
    assert model_info(REPO, token=False).sha == main
    folder = Path(snapshot_download(REPO, revision="v2", token=False))
    assert (folder / "config.json").read_bytes() == (output_dir / "config.json").read_bytes()
    push(output_dir, revision="v2", commit_message="again")  # the branch may exist
    assert "again" not in commits(hub)


def test_pull_request_leaves_main_alone(hub: HubServer, output_dir: Path):
    info = push(output_dir, create_pr=True)
    assert info.pr_revision == "refs/pr/1"
    assert model_info(REPO, revision="refs/pr/1", token=False).sha == info.oid
    assert "config.json" not in {s.rfilename for s in model_info(REPO, token=False).siblings}
    with pytest.raises(ArgumentError, match="against `main`"):
        push(output_dir, create_pr=True, revision="v2")


def test_not_blocking_gives_a_future(hub: HubServer, output_dir: Path):
    future = push(output_dir, blocking=False)
    assert isinstance(future, Future)
    assert future.result(timeout=60).oid == model_info(REPO, token=False).sha


def test_background_failures_are_as_clear(hub: HubServer, output_dir: Path):
    hub.fail("POST", "/commit/", status=403)
    with pytest.raises(HubError, match="may not write"):
        push(output_dir, blocking=False).result(timeout=60)


def test_leftovers_of_the_machine_are_not_sent(hub: HubServer, output_dir: Path):
    (output_dir / "_README.previous.md").write_text("old")
    assert (output_dir / ".frmerge_sources.json").exists()
    (output_dir / "checkpoint-1").mkdir()
    (output_dir / "checkpoint-1" / "state.json").write_text("{}")
    push(output_dir)
    names = {s.rfilename for s in model_info(REPO, token=False).siblings}
    assert names == {
        ".gitattributes", "README.md", "config.json", "merge_coefficients.safetensors",
        "merge_manifest.json", "model.safetensors",
    }  # fmt: skip


def test_weights_of_an_earlier_push_that_would_be_loaded_instead_are_deleted(
    hub: HubServer, output_dir: Path, sharded_dir: Path
):
    push(output_dir)
    HfApi(token=ALICE_TOKEN).upload_file(path_or_fileobj=b"mine", path_in_repo="extra/model.safetensors", repo_id=REPO)
    push(sharded_dir)
    names = {s.rfilename for s in model_info(REPO, token=False).siblings}
    assert "model.safetensors" not in names
    assert {"model.safetensors.index.json", "extra/model.safetensors"} <= names
    assert {path.name for path in sharded_dir.glob("model-*")} <= names


@pytest.mark.parametrize("create_pr", [False, True])
def test_collection(hub: HubServer, output_dir: Path, create_pr: bool):
    collection = hub.collections["alice/merges-64f9"] = Collection("alice/merges-64f9")
    for _ in range(2):  # it may be there already
        push(output_dir, collection="alice/merges-64f9", create_pr=create_pr)
        assert collection.items == [{"id": REPO, "type": "model"}]
    with pytest.raises(HubError, match=f"{REPO} was pushed, but not added to the collection alice/none: .*not found"):
        push(output_dir, collection="alice/none")


# Nothing local leaves the machine


def everything_sent(hub: HubServer) -> str:
    """All bodies, with what is base64 in them decoded too."""
    texts = []
    for request in hub.requests:
        body = request.body.decode("latin-1")
        texts.append(request.path + body)
        for line in body.splitlines():
            if '"encoding": "base64"' in line or '"sample"' in line:
                entry = json.loads(line)
                contents = [entry["value"]["content"]] if "value" in entry else [f["sample"] for f in entry["files"]]
                texts += [base64.b64decode(content).decode("latin-1") for content in contents]
    return "\n".join(texts)


def test_no_path_no_user_and_no_token_is_sent(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A whole merge, as a person with an unusual name makes it at home, and everything that goes over the wire."""
    home = tmp_path / "home" / "quibbleson"
    monkeypatch.setenv("HOME", str(home))
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "quibbleson")
    assert getpass.getuser() == "quibbleson"
    save_llama_family(home / "models", ["some", "words", "that", "people", "say", "to", "each", "other"], spread=0.1)
    (home / "models" / "code" / "README.md").write_text("---\nlicense: mit\ndatasets: /home/quibbleson/data\n---\n")
    config = json.loads((home / "models" / "code" / "config.json").read_text())
    (home / "models" / "code" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))  # makes a note
    hub.add_repo("lab/math", {path.name: path.read_bytes() for path in (home / "models" / "math").iterdir()})
    monkeypatch.chdir(home)
    args = MergingArguments(output_dir="out", disable_tqdm=True, hub_token=ALICE_TOKEN, run_name="first")
    merger = FisherRaoMerger(["lab/math", "models/code", "~/models/math"], args, base_model=str(home / "models/base"))
    merger.merge().evaluate(["words that people say"])
    assert merger.push_to_hub("alice/home-made") is not None

    sent = everything_sent(hub)
    headers = [(name, value) for request in hub.requests for name, value in request.headers.items()]
    sent += "\n".join(f"{name}: {value}" for name, value in headers if name != "authorization")
    weights = (home / "out" / "model.safetensors").read_bytes().decode("latin-1")
    assert all(part in sent for part in ("rms_norm_eps is", "WordLevel", weights))  # notes, small files, large ones
    for local in ("quibbleson", str(tmp_path), "/tmp/", "/root/", "/home/", tempfile.gettempdir(), ALICE_TOKEN):
        assert local.lower() not in sent.lower(), local
    for request in hub.requests:
        if "lfs-storage" in request.path:  # not the Hub's own host: signed links, no token
            assert "authorization" not in request.headers
        elif request.method in ("POST", "PUT"):
            assert request.headers["authorization"] == f"Bearer {ALICE_TOKEN}"


def test_a_local_path_that_got_into_the_manifest_is_shortened_on_the_way(
    hub: HubServer, output_dir: Path, tmp_path: Path
):
    path = output_dir / "merge_manifest.json"
    noted = {**json.loads(path.read_text()), "notes": [f"{tmp_path}/math differs."]}
    path.write_text(json.dumps(noted, indent=1) + "\n")
    before = path.read_bytes()
    push(output_dir)
    assert path.read_bytes() == before  # `frmerge verify` finds local experts by what is kept here
    public = json.loads(hub.repos["models", REPO].commit_of("main").files["merge_manifest.json"].data)
    assert public == {**json.loads(before), "notes": ["./math differs."]}


def test_a_path_in_the_header_of_weights_stops_the_push(hub: HubServer, output_dir: Path, tmp_path: Path):
    save_file({"a": np.ones(1)}, output_dir / "extra.safetensors", metadata={"made_from": f"{tmp_path}/data"})
    with pytest.raises(HubError, match=r"extra\.safetensors, line 1, contains a path of this machine"):
        push(output_dir)
    assert hub.requests == []


def test_the_place_of_an_expert_stops_the_push_wherever_it_is(hub: HubServer, output_dir: Path):
    sources = json.loads((output_dir / ".frmerge_sources.json").read_text())
    sources["models"][0] = "/data/team-x/secret/e0"
    (output_dir / ".frmerge_sources.json").write_text(json.dumps(sources))
    (output_dir / "notes.md").write_text("from /data/team-x/secret/e0")
    with pytest.raises(HubError, match=r"notes\.md, line 1, contains a path of this machine \(/data/team-x/secret/"):
        push(output_dir)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("config.json", "Take it out of that file of the model it came from, merge again"),
        ("a.html", "out of the file"),
    ],
)
def test_a_local_path_in_another_file_stops_the_push(
    hub: HubServer, output_dir: Path, tmp_path: Path, name: str, remedy: str
):
    (output_dir / name).write_text(json.dumps({"adapter": f"{tmp_path}/base"}))
    with pytest.raises(HubError, match=rf"{name}, line 1, contains a path of this machine .*{remedy}"):
        push(output_dir)
    assert hub.requests == []


def test_a_token_in_a_file_stops_the_push_without_being_repeated(hub: HubServer, output_dir: Path):
    (output_dir / "notes.txt").write_text(f"log in with {ALICE_TOKEN}")
    with pytest.raises(HubError, match=r"notes\.txt contains your access token") as caught:
        push(output_dir)
    assert ALICE_TOKEN not in str(caught.value)
    assert hub.requests == []


# What is not finished is not pushed


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("merge_manifest.json", "not the output of a finished merge"),
        ("config.json", "neither config.json nor adapter_config.json"),
        ("model.safetensors", "lacks 1 of 1 weight files"),
        ("README.md", "frmerge card"),
    ],
)
def test_incomplete_folder(hub: HubServer, output_dir: Path, missing: str, words: str):
    (output_dir / missing).unlink()
    with pytest.raises(HubError, match=words):
        push(output_dir)
    assert hub.requests == []


def test_missing_shard_is_named(hub: HubServer, output_dir: Path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (output_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    (output_dir / "model.safetensors").rename(output_dir / "model-00001-of-00002.safetensors")
    with pytest.raises(HubError, match=r"lacks 1 of 2 weight files, model-00002-of-00002\.safetensors among them"):
        push(output_dir)


def test_interrupted_merge(hub: HubServer, output_dir: Path):
    (output_dir / ".frmerge").mkdir()
    with pytest.raises(HubError, match="interrupted"):
        push(output_dir)


def test_no_folder(hub: HubServer, tmp_path: Path):
    with pytest.raises(HubError, match="no folder"):
        push(tmp_path / "nowhere")


def test_adapter_folder_is_complete_with_its_own_files(hub: HubServer, tmp_path: Path):
    experts = [str(folder) for folder in expert_dirs().values()][:2]
    args = MergingArguments(output_dir=str(tmp_path / "adapter"), disable_tqdm=True)
    FisherRaoMerger(experts, args).merge()
    push(tmp_path / "adapter")
    assert "adapter_model.safetensors" in {s.rfilename for s in model_info(REPO, token=False).siblings}
    table = tmp_path / "adapter" / "adapter_model.safetensors"
    table.write_bytes(table.read_bytes()[:-1] + b"!")
    with pytest.raises(HubError, match=r"adapter_model\.safetensors was changed after the merge"):
        push(tmp_path / "adapter")


@pytest.fixture
def local_adapters(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two adapters that were trained on a folder; the base is on the Hub as `lab/base`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    save_llama_family(tmp_path / "models", ["some", "words"], spread=0.1)
    base = tmp_path / "models" / "base"
    hub.add_repo("lab/base", {path.name: path.read_bytes() for path in base.iterdir()})
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / f"a{seed}")
        folders.append(str(tmp_path / f"a{seed}"))
    return folders


@pytest.mark.parametrize("place", ["here", "/mnt/train/run7", "C:\\models\\base", "models/base", "base"])
def test_an_adapter_is_pushed_with_the_hub_id_of_its_base_or_not_at_all(
    hub: HubServer, local_adapters: list[str], tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for folder in map(Path, local_adapters):
        config = json.loads((folder / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": str(tmp_path / "models/base")} if place == "here" else {}
        config |= {"base_model_name_or_path": place} if place != "here" else {}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    args = MergingArguments(output_dir="out", disable_tqdm=True, overwrite=True)
    FisherRaoMerger(local_adapters, args).merge()
    hub.requests.clear()
    with pytest.raises(HubError, match=r"adapter_config\.json names the base model .*--base-model ORG/NAME"):
        push(tmp_path / "out")
    assert hub.requests == []

    FisherRaoMerger(local_adapters, args, base_model="lab/base").merge()
    push(tmp_path / "out")
    files = hub.repos["models", REPO].commit_of("main").files
    assert json.loads(files["adapter_config.json"].data)["base_model_name_or_path"] == "lab/base"
    assert ModelCard(files["README.md"].data.decode()).data.base_model == ["lab/base"]
    sent = everything_sent(hub)
    assert not any(local in sent for local in (str(tmp_path), "/mnt/train", "C:\\models"))
    ids = torch.arange(3).view(1, -1)
    with torch.no_grad():
        loaded = AutoPeftModelForCausalLM.from_pretrained(REPO)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "models/base")
        torch.testing.assert_close(loaded, PeftModel.from_pretrained(base, tmp_path / "out")(ids).logits)


def test_where_a_model_was_loaded_from_is_left_out_on_the_way(hub: HubServer, tmp_path: Path):
    """transformers 4 wrote that into configurations; the merge takes them over from its first model."""
    save_llama_family(tmp_path / "models", ["some", "words"], spread=0.1)
    keys = {"config.json": "_name_or_path", "tokenizer_config.json": "name_or_path"}
    for name, key in {**keys, "preprocessor_config.json": "_name_or_path"}.items():
        path = tmp_path / "models/math" / name
        config = json.loads(path.read_text()) if path.is_file() else {"feature_extractor_type": "X"}
        path.write_text(json.dumps({**config, key: "/mnt/training/run 7/math"}))
    experts = [str(tmp_path / "models" / name) for name in ("math", "code")]
    args = MergingArguments(output_dir=str(tmp_path / "out"), disable_tqdm=True)
    FisherRaoMerger(experts, args).merge()
    push(tmp_path / "out")
    files = hub.repos["models", REPO].commit_of("main").files
    recorded = json.loads(files["merge_manifest.json"].data)["files"]
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert "/mnt/training/run 7/math" in (tmp_path / "out" / name).read_text()
        assert "name_or_path" not in files[name].data.decode()
        assert recorded[name]["sha256"] == hashlib.sha256(files[name].data).hexdigest()
        assert recorded[name]["size"] == len(files[name].data)
    snapshot = snapshot_download(REPO, local_dir=tmp_path / "pulled")
    assert verify(str(snapshot), experts=experts).ok


# What was changed since the merge is not pushed


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "merge_coefficients.safetensors"])
def test_a_changed_file_is_not_pushed(hub: HubServer, output_dir: Path, name: str):
    flip_last_byte(output_dir / name)
    with pytest.raises(HubError, match=rf"is not what the merge wrote: {name} was changed after the merge"):
        push(output_dir)
    (output_dir / name).write_bytes((output_dir / name).read_bytes() + b"x")
    with pytest.raises(HubError, match=rf"{name} has another size than the merge gave it"):
        push(output_dir)
    assert hub.requests == []


def test_large_files_are_checked_by_their_tensors(hub: HubServer, sharded_dir: Path):
    shard = sorted(sharded_dir.glob("model-*"))[0]
    whole = shard.read_bytes()
    flip_last_byte(shard)
    with pytest.raises(HubError, match=rf"tensor '[\w.]+' in {shard.name} was changed after the merge"):
        push(sharded_dir)
    shard.write_bytes(whole.replace(b'"pt"', b'"np"'))
    with pytest.raises(HubError, match=rf"the header of {shard.name} was changed after the merge"):
        push(sharded_dir)
    assert hub.requests == []
    shard.write_bytes(whole)
    push(sharded_dir)
    public = json.loads(hub.repos["models", REPO].commit_of("main").files["merge_manifest.json"].data)
    for name, entry in public["files"].items():  # what the merge left out, the push has filled in
        assert entry["sha256"] == hashlib.sha256((sharded_dir / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("block", ["row", "head", "layer", "model"])
def test_tensors_are_checked_however_they_were_cut(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str
):
    monkeypatch.setattr("hf_frmerge.merging.planning.blocks.PIECE_ELEMENTS", 100)
    monkeypatch.setattr("hf_frmerge.merging.record.checksums.SMALL_FILE", 0)
    experts = [write_model(tmp_path / f"s{seed}", random_model(seed)) for seed in range(2)]
    skipped = "model.layers.0.mlp.up_proj.weight"

    class Skip(MergeCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            control.should_skip_tensor = state.current_tensor == skipped
            return control

    args = MergingArguments(output_dir=str(tmp_path / "out"), block=block, disable_tqdm=True)
    FisherRaoMerger(experts, args, callbacks=[Skip]).merge()
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["tensors"][skipped]["action"] == "skip"
    assert manifest["files"]["model.safetensors"]["sha256"] is None
    push(tmp_path / "out")


# What the Hub refuses, in sentences


def refused(output_dir: Path, **kwargs) -> str:
    with pytest.raises(HubError) as caught:
        push(output_dir, **kwargs)
    assert ALICE_TOKEN not in str(caught.value)
    return str(caught.value)


def test_not_logged_in(hub: HubServer, output_dir: Path):
    assert "hf auth login" in refused(output_dir, token=None)


def test_wrong_token(hub: HubServer, output_dir: Path):
    message = refused(output_dir, token="wrong-token")
    assert "hf auth login" in message
    assert "wrong-token" not in message


def test_token_from_the_environment(hub: HubServer, output_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", ALICE_TOKEN)
    assert push(output_dir, token=None).oid == model_info(REPO, token=False).sha


def test_read_only_token(hub: HubServer, output_dir: Path):
    hub.add_user("alice", "read-token", can_write=False)
    assert "write permission" in refused(output_dir, token="read-token")


def test_namespace_of_someone_else(hub: HubServer, output_dir: Path):
    assert "bob/model" in refused(output_dir, repo_id="bob/model")


def test_organisation_of_the_user(hub: HubServer, output_dir: Path):
    push(output_dir, repo_id="lab/model")
    assert ("models", "lab/model") in hub.repos


@pytest.mark.parametrize("repo_id", ["a/b/c", "bad name", "-dash/"])
def test_bad_id(hub: HubServer, output_dir: Path, repo_id: str):
    with pytest.raises(ArgumentError, match="not a valid Hub id"):
        push(output_dir, repo_id=repo_id)


def test_front_matter_the_hub_does_not_like(hub: HubServer, output_dir: Path):
    card = output_dir / "README.md"
    card.write_text(card.read_text().replace("- ann/austen-135m", "- ./austen", 1))
    assert '"base_model" with value "./austen" is not valid' in refused(output_dir)


def test_concurrent_change(hub: HubServer, output_dir: Path):
    hub.fail("POST", "/commit/", status=412)
    assert "changed by someone else" in refused(output_dir)


def test_rate_limit_says_how_long(hub: HubServer, output_dir: Path):
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "60"})
    assert "in 60 seconds" in refused(output_dir)


def test_unreachable_hub(hub: HubServer, output_dir: Path):
    hub.fail("POST", "/api/repos/create")
    assert "could not be reached" in refused(output_dir)


def test_offline_mode(hub: HubServer, output_dir: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    try:
        assert "offline mode" in refused(output_dir)
    finally:
        monkeypatch.undo()
        close_session()


# Faults on the way


def test_a_passing_failure_of_the_storage_is_retried(hub: HubServer, output_dir: Path):
    hub.fail("PUT", "/lfs-storage/", status=500)
    push(output_dir)
    digest = hashlib.sha256((output_dir / "model.safetensors").read_bytes()).hexdigest()
    assert hub.lfs[digest] == (output_dir / "model.safetensors").read_bytes()


def test_an_interrupted_push_goes_on_where_it_stopped(hub: HubServer, output_dir: Path):
    hub.fail("POST", "/commit/", status=503)
    assert "HTTP 503" in refused(output_dir)
    assert commits(hub) == ["initial commit"]  # nothing half visible
    assert len(hub.sent("PUT", "/lfs-storage/")) == 2
    push(output_dir)
    assert len(hub.sent("PUT", "/lfs-storage/")) == 2  # the weights were not sent again
    assert len(commits(hub)) == 2


def test_connection_lost_during_the_commit(hub: HubServer, output_dir: Path):
    hub.fail("POST", "/commit/")
    assert "could not be reached" in refused(output_dir)
    push(output_dir)
    assert len(commits(hub)) == 2


def test_storage_that_keeps_failing_names_the_hub_not_a_python_error(
    hub: HubServer, output_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's waits between its six tries
    hub.fail("PUT", "/lfs-storage/", status=500, times=100)
    assert "HTTP 500" in refused(output_dir)
