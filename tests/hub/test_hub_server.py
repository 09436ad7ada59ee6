"""The local Hub behaves, towards the real client, as the conventions of the real one say."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import pytest
from hub_server import ALICE_TOKEN, HubServer
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download, whoami
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "sub/notes.txt": b"deep"}


def test_whoami(hub: HubServer):
    assert whoami(token=ALICE_TOKEN)["name"] == "alice"
    with pytest.raises(HfHubHTTPError):
        whoami(token="nonsense")


def test_missing_and_private_repositories_look_the_same(hub: HubServer):
    hub.add_repo("alice/hidden", FILES, private=True)
    hub.add_user("bob", "token-of-bob")
    for repo_id in ("alice/hidden", "alice/missing"):
        with pytest.raises(RepositoryNotFoundError) as caught:
            HfApi().model_info(repo_id, token="token-of-bob")
        assert caught.value.response.status_code == 404
        with pytest.raises(RepositoryNotFoundError) as caught:
            HfApi().model_info(repo_id, token=False)
        assert caught.value.response.status_code == 401
    assert HfApi().model_info("alice/hidden", token=ALICE_TOKEN).private


def test_gated_repository_shows_its_card_but_not_its_files(hub: HubServer):
    repo = hub.add_repo("lab/gated", FILES, gated=True)
    hub.add_user("bob", "token-of-bob")
    assert HfApi().model_info("lab/gated", token=False).gated == "manual"
    for token in (False, "token-of-bob"):
        with pytest.raises(GatedRepoError):
            hf_hub_download("lab/gated", "config.json", token=token)
    repo.granted.add("bob")
    assert Path(hf_hub_download("lab/gated", "config.json", token="token-of-bob")).read_bytes() == b"{}"


def test_missing_revision_and_file(hub: HubServer):
    hub.add_repo("alice/model", FILES)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("alice/model", "config.json", revision="nowhere", token=False)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/model", "nothing.json", token=False)


def test_large_files_come_from_another_host_that_never_sees_the_token(hub: HubServer):
    hub.add_repo("alice/model", FILES, private=True)
    folder = Path(snapshot_download("alice/model", token=ALICE_TOKEN, allow_patterns=["*.safetensors", "*.txt"]))
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not (folder / "config.json").exists()
    (download,) = hub.sent("GET", "/lfs-storage/")
    assert "authorization" not in download.headers
    assert download.headers["host"].startswith("localhost:")


def test_ranged_reads(hub: HubServer):
    hub.add_repo("alice/model", FILES)
    with HfFileSystem(token=False).open("alice/model/model.safetensors", "rb", block_size=16) as file:
        file.seek(1000)
        assert file.read(10) == FILES["model.safetensors"][1000:1010]
    assert sum(int(r.headers.get("range") is not None) for r in hub.sent("GET", "/lfs-storage/|/resolve/")) >= 1


def test_interrupted_download_resumes_by_range(hub: HubServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is written, and so kept, at once
    weights = bytes(range(1, 251)) * 50  # in no other test: the cache must not have it
    hub.add_repo("alice/model", {"model.safetensors": weights})
    hub.fail("GET", "/lfs-storage/", after_bytes=4000)
    with suppress(HTTPError):  # before 1.20 the Hub's client does not try again by itself
        hf_hub_download("alice/model", "model.safetensors", token=False)
    path = Path(hf_hub_download("alice/model", "model.safetensors", token=False))
    assert path.read_bytes() == weights
    assert hub.sent("GET", "/lfs-storage/")[1].headers["range"].startswith("bytes=4000-")


def test_upload_with_the_wrong_hash_is_refused(hub: HubServer):
    import urllib.error
    import urllib.request

    url = f"{hub.endpoint}/lfs-storage/{hashlib.sha256(b'announced').hexdigest()}"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, data=b"sent", method="PUT"))
    assert caught.value.code == 400
    assert hub.lfs == {}


def test_stale_parent_commit_is_refused(hub: HubServer):
    repo = hub.add_repo("alice/model", FILES)
    first = next(iter(repo.commits))
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi(token=ALICE_TOKEN).upload_file(
            path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/model", parent_commit=first
        )
    assert caught.value.response.status_code == 412


def test_branches_and_trees(hub: HubServer):
    hub.add_repo("alice/model", FILES)
    api = HfApi(token=ALICE_TOKEN)
    api.create_branch("alice/model", branch="dev")
    assert {branch.name for branch in api.list_repo_refs("alice/model").branches} == {"main", "dev"}
    assert {entry.path for entry in api.list_repo_tree("alice/model")} == {".gitattributes", *FILES} - {
        "sub/notes.txt"
    } | {"sub"}
    (info,) = api.get_paths_info("alice/model", ["model.safetensors"])
    assert info.lfs.sha256 == hashlib.sha256(FILES["model.safetensors"]).hexdigest()


def test_datasets_have_their_own_names(hub: HubServer):
    hub.add_repo("alice/texts", {"train.txt": b"words"}, kind="datasets")
    path = hf_hub_download("alice/texts", "train.txt", repo_type="dataset", token=False)
    assert Path(path).read_bytes() == b"words"
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("alice/texts", "train.txt", token=False)


def test_snapshots_are_served_from_the_cache_the_second_time(hub: HubServer):
    hub.add_repo("alice/model", FILES)
    first = snapshot_download("alice/model", token=False)
    n_requests = len(hub.requests)
    assert snapshot_download("alice/model", token=False) == first
    assert len(hub.requests) - n_requests == 1  # only the revision is asked again
