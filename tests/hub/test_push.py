from __future__ import annotations

import base64
import getpass
import hashlib
import json
from concurrent.futures import Future
from pathlib import Path

import pytest
from card_examples import full
from hub_server import ALICE_TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard, create_repo, model_info, snapshot_download

from hf_frmerge.errors import ArgumentError, HubError
from hf_frmerge.hub.push import full_repo_id, push_folder

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
        if path.name != "merge_manifest.json":  # its local paths are shortened on the way
            assert (copy / path.name).read_bytes() == path.read_bytes()


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
    (output_dir / ".frmerge_sources.json").write_text(json.dumps({"models": [str(output_dir)]}))
    (output_dir / "checkpoint-1").mkdir()
    (output_dir / "checkpoint-1" / "state.json").write_text("{}")
    push(output_dir)
    names = {s.rfilename for s in model_info(REPO, token=False).siblings}
    assert names == {
        ".gitattributes", "README.md", "config.json", "merge_coefficients.safetensors", "merge_evaluation.json",
        "merge_manifest.json", "model.safetensors",
    }  # fmt: skip


def test_weights_of_an_earlier_push_that_would_be_loaded_instead_are_deleted(hub: HubServer, output_dir: Path):
    push(output_dir)
    shard = "model-00001-of-00001.safetensors"
    (output_dir / "model.safetensors").rename(output_dir / shard)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
    (output_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    HfApi(token=ALICE_TOKEN).upload_file(path_or_fileobj=b"mine", path_in_repo="extra/model.safetensors", repo_id=REPO)
    push(output_dir)
    names = {s.rfilename for s in model_info(REPO, token=False).siblings}
    assert "model.safetensors" not in names
    assert {shard, "model.safetensors.index.json", "extra/model.safetensors"} <= names


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


def test_no_path_no_user_and_no_token_is_sent(hub: HubServer, output_dir: Path, tmp_path: Path):
    push(output_dir)
    sent = everything_sent(hub)
    assert "one model made out of" in sent  # the decoding works
    assert '"./math"' in sent  # the manifest's local expert, by name
    assert str(tmp_path) not in sent
    assert str(Path.home()) + "/" not in sent
    assert f"/{getpass.getuser()}/" not in sent
    assert ALICE_TOKEN not in sent
    for request in hub.requests:
        others = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert ALICE_TOKEN not in str(others)
        if "lfs-storage" in request.path:  # not the Hub's own host: signed links, no token
            assert "authorization" not in request.headers


def test_the_local_manifest_keeps_its_paths(hub: HubServer, output_dir: Path, tmp_path: Path):
    before = (output_dir / "merge_manifest.json").read_bytes()
    push(output_dir)
    assert (output_dir / "merge_manifest.json").read_bytes() == before
    assert str(tmp_path).encode() in before


def test_a_local_path_in_another_file_stops_the_push(hub: HubServer, output_dir: Path, tmp_path: Path):
    (output_dir / "config.json").write_text(json.dumps({"_name_or_path": f"{tmp_path}/base"}))
    with pytest.raises(HubError, match=r"config\.json, line 1, contains a path of this machine"):
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


def test_adapter_folder_is_complete_with_its_own_files(hub: HubServer, output_dir: Path):
    (output_dir / "model.safetensors").rename(output_dir / "adapter_model.safetensors")
    (output_dir / "config.json").rename(output_dir / "adapter_config.json")
    push(output_dir)
    assert "adapter_model.safetensors" in {s.rfilename for s in model_info(REPO, token=False).siblings}


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
