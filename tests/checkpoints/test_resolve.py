"""Finding checkpoints: folders, URLs, Hub ids online and offline, each failure by its own sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import fsspec
import pytest
import torch
from hub_server import ALICE_TOKEN
from hub_server.state import Blob
from huggingface_hub import snapshot_download
from packaging.version import Version
from safetensors.torch import load_file

from hf_frmerge.checkpoints.hub.find import download_size
from hf_frmerge.checkpoints.resolve import Source, resolve, resolve_all, split_pair
from hf_frmerge.checkpoints.source import gguf_parts, refuse_gguf
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.errors import CheckpointError, HubError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def model(tmp_path, save_model) -> Path:
    save_model(tmp_path / "model")
    return tmp_path / "model"


# Local folders


def test_folder(model, monkeypatch):
    assert resolve(str(model)) == Source(str(model), "full", str(model))
    monkeypatch.chdir(model.parent)
    for spec in ("model", "./model", "model/"):  # a folder goes before a Hub id of that name
        source = resolve(spec)
        assert source.repo_id is None
        assert Path(source.path).resolve() == model.resolve()


def test_home_is_expanded(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve("~/model").path == str(model)


def test_sharded_folder(tmp_path, save_model):
    save_model(tmp_path / "m", max_shard_size="20KB")
    assert resolve(str(tmp_path / "m")).kind == "full"


def test_adapter_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    assert resolve(str(tmp_path)).kind == "adapter"


@pytest.mark.parametrize("where", ["folder", "url", "hub"])
def test_a_model_and_an_adapter_in_one_place_are_told_apart_by_moving_one_of_them(hub, model, tmp_path, where):
    spec = {"folder": str(model), "url": "memory://both", "hub": "alice/both"}[where]
    files = contents(model) | {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    hub.add_repo("alice/both", files)
    for name, data in files.items():
        (model / name).write_bytes(data)
        fsspec.filesystem("memory").pipe(f"/both/{name}", data)
    with pytest.raises(
        CheckpointError, match=rf"{spec}.*\(model\.safetensors\) and an adapter \(adapter_config\.json"
    ):
        resolve(spec)
    assert hub.sent("GET", "/resolve/") == []  # nothing was downloaded
    if where == "hub":
        command = [str(Path(sys.executable).with_name("hf")), "download", spec, "--exclude", "adapter_*"]
        subprocess.run([*command, "--local-dir", str(tmp_path / "alone")], check=True, capture_output=True)
        assert resolve(str(tmp_path / "alone")).kind == "full"
    elif where == "folder":
        (tmp_path / "adapter").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (model / name).rename(tmp_path / "adapter" / name)
        assert resolve(spec).kind == "full"
        assert resolve(str(tmp_path / "adapter")).kind == "adapter"


@pytest.mark.parametrize("spec", ["./nothing", "../nothing", "/no/such/folder", "~/no-such-folder", "a/b/c", "a b"])
def test_paths_that_do_not_exist_are_not_asked_of_the_hub(hub, spec):
    with pytest.raises(CheckpointError, match="There is no folder"):
        resolve(spec)
    assert hub.requests == []


def test_file_in_place_of_its_folder(model):
    with pytest.raises(CheckpointError, match=r"is a file\. Pass the folder"):
        resolve(str(model / "model.safetensors"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is empty"),
        (["config.json", "notes.md"], r"holds no weights: expected .*, found config.json, notes.md"),
        (["pytorch_model.bin"], r"pickle weights only \(pytorch_model.bin\).*--allow-pickle"),
        (["consolidated.00.pth"], "pickle weights only"),
        (["consolidated.safetensors"], r"holds neither .*, but consolidated.safetensors"),
        (["training_args.bin"], "holds no weights"),
        (["model.safetensors"], "has weights but no config.json"),
        (["adapter_config.json", "adapter_model.bin"], r"pickle weights only \(adapter_model.bin\).*--allow-pickle"),
        (["adapter_config.json"], "is an adapter without adapter_model.safetensors"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        resolve(str(tmp_path))


def test_a_folder_too_high_names_the_models_below(tmp_path, model):
    def copy(folder):
        folder.mkdir(parents=True)
        for file in model.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        copy(tmp_path / "models--org--name/snapshots" / commit)
    (tmp_path / "models--org--name/refs").mkdir()
    (tmp_path / "models--org--name/refs/main").write_text(commits[1])
    for step in (500, 1000, 90, 7):
        copy(tmp_path / f"run/checkpoint-{step}")
    (tmp_path / "run/trainer_log.jsonl").write_text("{}")
    (tmp_path / "adapters/poetry").mkdir(parents=True)
    (tmp_path / "adapters/poetry/adapter_config.json").write_text("{}")
    (tmp_path / "adapters/poetry/adapter_model.safetensors").write_bytes(b"")
    advised = {
        "models--org--name": [f"snapshots/{commit}" for commit in reversed(commits)],
        "run": ["checkpoint-1000", "checkpoint-500", "checkpoint-90"],
        "adapters": ["poetry"],
    }
    for name, below in advised.items():
        with pytest.raises(CheckpointError, match=r"holds no model itself, but there (is one|are models)") as caught:
            resolve(str(tmp_path / name))
        paths = re.findall(r"'([^']*)'", str(caught.value).partition("Pass ")[2])
        assert paths == [str(tmp_path / name / each) for each in below]
        assert all(resolve(path).path == path for path in paths)
        assert ("and 1 more" in str(caught.value)) == (name == "run")


def test_base_plus_adapter_is_told_how_to_become_one_model():
    command = "frmerge merge org/lora --base-model e1 --output-dir folded"
    with pytest.raises(CheckpointError, match=f"one expert, but nothing else does. Fold .*`{command}`"):
        resolve("e1+org/lora")


def test_folders_with_a_plus_in_their_name_go_before_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c++", "c++-lora", "a+b"):
        (tmp_path / name).mkdir()
    assert split_pair("a+b") is None
    assert split_pair("c+++c++-lora") == ("c++", "c++-lora")
    assert split_pair("org/c++org/lora") == ("org/c", "+org/lora")
    assert split_pair("memory://a+b") is None and split_pair("a+") is None and split_pair("+b") is None


def test_a_gguf_file_and_a_folder_that_holds_one(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("tiny.gguf", "README.md"):
        (folder / name).touch()
    path = str(folder / "tiny.gguf")
    assert resolve(str(folder)) == Source(str(folder), "full", path, is_gguf=True)
    assert resolve(path) == Source(path, "full", path, is_gguf=True)
    (folder / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="has weights but no config"):
        resolve(str(folder))
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.gguf' is empty"):
        resolve(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("name", ["b-00001-of-00002.gguf", "b-00002-of-00002.gguf"])
def test_each_file_of_a_split_model_stands_for_all(tmp_path, name):
    for number in (1, 2):
        (tmp_path / f"b-0000{number}-of-00002.gguf").touch()
    first = str(tmp_path / "b-00001-of-00002.gguf")
    assert resolve(str(tmp_path / name)).path == resolve(str(tmp_path)).path == first
    assert gguf_parts(name) == ["b-00001-of-00002.gguf", "b-00002-of-00002.gguf"]


def test_gguf_files_elsewhere_are_to_be_fetched():
    fsspec.filesystem("memory").pipe("/quantised/tiny-q4.gguf", b"GGUF")
    with pytest.raises(CheckpointError, match=r"--local-dir FOLDER`\), and pass it: FOLDER/tiny-q4\.gguf"):
        resolve("memory://quantised")


def test_what_makes_a_model_of_a_gguf_file_works(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("transformers", minversion="5.23")  # has GgufConfig
    from gguf_files import Type, tensors_of, write_gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    (tmp_path / "m").mkdir()
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    write_gguf(tmp_path / "m/tiny.gguf", "llama", config, tensors_of(model, "llama"), Type.F32)
    with pytest.raises(CheckpointError, match=r"An evaluation .*m' is a GGUF file\. Let transformers") as refused:
        refuse_gguf([resolve(str(tmp_path / "m"))])
    code = [line[4:] for line in str(refused.value).splitlines() if line.startswith("    ")]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(code[:-1]).replace("ITS FOLDER", str(tmp_path / "m")), {})  # this file has no tokenizer
    assert resolve("converted").kind == "full"
    converted = load_file("converted/model.safetensors")
    assert torch.equal(converted["lm_head.weight"], model.lm_head.weight)
    assert "quantization_config" not in json.loads(Path("converted/config.json").read_text())


# URLs


def test_file_url_is_a_folder(model):
    assert resolve(f"file://{model}") == Source(f"file://{model}", "full", str(model))
    with pytest.raises(CheckpointError, match="There is no folder 'file:///no/such'"):
        resolve("file:///no/such")


def test_memory_url(model):
    import fsspec

    fs = fsspec.filesystem("memory")
    for name, data in contents(model).items():
        fs.pipe_file(f"/m/{name}", data)
    assert resolve("memory://m") == Source("memory://m", "full", "memory://m")
    fs.rm("/m/model.safetensors")
    with pytest.raises(CheckpointError, match="holds no weights"):
        resolve("memory://m")
    fs.store.clear()


def test_web_url(model, web):
    source = resolve(f"{web[0]}/model")
    assert source.kind == "full"
    with open_checkpoint(source) as remote, open_checkpoint(resolve(str(model))) as local:
        assert remote.read("model.norm.weight").tobytes() == local.read("model.norm.weight").tobytes()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor .* was found there"):
        resolve(f"{web[0]}/nothing")


def test_web_server_that_is_down():
    with pytest.raises(CheckpointError, match=r"could not be opened: .*Cannot connect"):
        resolve("http://127.0.0.1:9/model")


def test_unknown_protocol():
    with pytest.raises(CheckpointError, match="Cannot open 'nonsense://x': Protocol not known: nonsense"):
        resolve("nonsense://x")


def test_missing_protocol_package_is_named():
    with pytest.raises(CheckpointError, match="s3fs"):
        resolve("s3://bucket/model")


# The Hub


def test_hub_id_is_pinned_to_a_commit(hub, model):
    repo = hub.add_repo("alice/m", contents(model))
    source = resolve("alice/m")
    assert (source.repo_id, source.revision, source.commit) == ("alice/m", None, repo.branches["main"])
    assert source.path.endswith(f"snapshots/{source.commit}")
    with open_checkpoint(source) as downloaded, open_checkpoint(resolve(str(model))) as original:
        assert downloaded.tensors == original.tensors
        assert downloaded.read("model.norm.weight").tobytes() == original.read("model.norm.weight").tobytes()


def test_revision(hub, model):
    repo = hub.add_repo("alice/revised", contents(model))
    first = repo.branches["main"]
    repo.branches["main"] = repo.branches["v2"] = repo.add_commit(
        repo.commit_of("main"), "More", dict(repo.commit_of("main").files)
    ).oid
    for revision, commit in (("v2", repo.branches["v2"]), (first, first)):
        source = resolve(f"alice/revised@{revision}")
        assert (source.repo_id, source.revision, source.commit) == ("alice/revised", revision, commit)
    with pytest.raises(HubError, match="alice/revised has no revision 'nope'"):
        resolve("alice/revised@nope")


def test_pickles_are_never_downloaded(hub, model):
    files = {**contents(model), "pytorch_model.bin": b"pickle", "training_args.bin": b"pickle", "a.pt": b"pickle"}
    hub.add_repo("alice/both", {**files, "consolidated.safetensors": b"the weights again"})
    names = {path.name for path in Path(resolve("alice/both").path).iterdir()}
    assert names == set(contents(model))
    assert hub.sent("GET", r"pickle|\.bin|\.pt|consolidated") == []


def test_pickle_only_repository_gets_the_hint(hub, model):
    hub.add_repo("alice/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(CheckpointError, match=r"'alice/old' has pickle weights only \(pytorch_model.bin\)"):
        resolve("alice/old")


def test_a_repository_of_gguf_files_is_to_be_fetched(hub):
    hub.add_repo("alice/quants", {"README.md": b"", "tiny-q4.gguf": b"GGUF", "tiny-q8.gguf": b"GGUF"})
    advice = r"hf download alice/quants tiny-q4\.gguf --local-dir FOLDER`\), and pass it: FOLDER/tiny-q4\.gguf"
    with pytest.raises(CheckpointError, match=advice):
        resolve("alice/quants")


def test_who_may_see_it(hub, model):
    hub.add_repo("lab/hidden", contents(model), private=True)
    hub.add_repo("bob/gated", contents(model), gated=True)
    with pytest.raises(HubError, match=r"bob/gated is gated: accept its terms"):
        resolve("bob/gated", token=ALICE_TOKEN)
    with pytest.raises(HubError, match=r"no model 'lab/hidden' on the Hub .* private model needs"):
        resolve("lab/hidden", token=False)
    with pytest.raises(HubError, match=r"no model 'lab/missing' on the Hub .* no local folder 'lab/missing'"):
        resolve("lab/missing", token=ALICE_TOKEN)
    assert resolve("lab/hidden", token=ALICE_TOKEN).kind == "full"


@pytest.fixture
def no_waits(monkeypatch) -> list[float]:
    """The client's waits between its tries, which nobody waits for."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 500}, r"The Hub failed \(HTTP 500\) at alice/down\. Try again later"),
        ({"status": 429}, r"limits the rate of requests\. Try alice/down again in a few minutes"),
        ({"status": 429, "headers": {"Retry-After": "9"}}, r"Try alice/down again in 9 seconds"),
        ({}, r"could not be reached for alice/down \(RemoteProtocolError\)\. Check the connection"),
        ({"status": 403}, r"Your token may not read alice/down"),
        ({"status": 451}, r"The Hub refused alice/down \(HTTP 451\): .*Ordered failure"),
    ],
)
@pytest.mark.parametrize("asked", [r"^/api/models/alice/down$", r"^/api/models/alice/down/tree/"])
def test_a_hub_that_does_not_answer(hub, model, no_waits, fault, message, asked):
    hub.add_repo("alice/down", contents(model))
    hub.fail("GET", asked, times=100, **fault)
    with pytest.raises(HubError, match=message):
        resolve("alice/down")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 503}, r"The Hub failed \(HTTP 503\) at alice/files\. .*files that were downloaded are kept"),
        ({"status": 429, "headers": {"Retry-After": "9"}}, r"Try alice/files again in 9 seconds"),
        ({}, r"could not be reached for alice/files"),
    ],
)
def test_a_download_that_fails_goes_on_with_what_is_missing(
    hub, model, no_waits, monkeypatch, tmp_path, fault, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.add_repo("alice/files", contents(model))
    hub.fail("GET", "/lfs-storage/", times=100, **fault)
    with pytest.raises(HubError, match=message):
        resolve("alice/files")
    if "headers" in fault and Version(version("huggingface_hub")) >= Version("1.23"):  # older clients do not listen
        assert set(no_waits) == {10.0}  # what the Hub asked for, and a second more
    hub.faults.clear()
    hub.requests.clear()
    with open_checkpoint(resolve("alice/files")) as downloaded, open_checkpoint(resolve(str(model))) as original:
        assert downloaded.read("model.norm.weight").tobytes() == original.read("model.norm.weight").tobytes()
    got = {request.path for request in hub.sent("GET", "/resolve/")}
    assert [path for path in got if not path.endswith("model.safetensors")] == []  # the small files were kept


def test_a_download_cut_short_goes_on_from_where_it_was(hub, model, no_waits, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add_repo("alice/cut", contents(model))
    hub.fail("GET", "/lfs-storage/", after_bytes=40_000)
    with suppress(HubError):  # before 1.20 the Hub's client does not try again by itself
        resolve("alice/cut")
    resolve("alice/cut")
    first, second = hub.sent("GET", "/lfs-storage/")
    assert "range" not in first.headers
    assert second.headers["range"].startswith("bytes=40000-")


def test_a_hub_that_is_down_is_not_needed_for_what_is_in_the_cache(hub, model, no_waits, caplog):
    repo = hub.add_repo("alice/kept", contents(model))
    actual = resolve("alice/kept")
    for fault in ({"status": 503}, {"status": 429}, {}):
        hub.fail("GET", "/api/models/alice/kept", times=6, **fault)
        assert resolve("alice/kept") == actual
        assert f"alice/kept is taken from the cache, at {repo.branches['main']}" in caplog.text
        hub.faults.clear()
        caplog.clear()
    hub.repos["models", "alice/kept"].private = True  # an answer is an answer, cache or not
    with pytest.raises(HubError, match="There is no model 'alice/kept'"):
        resolve("alice/kept", token=False)


def test_files_that_another_commit_brought_are_not_counted_as_missing(hub, model, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = hub.add_repo("alice/grown", contents(model))
    first = repo.commit_of("main")
    resolve("alice/grown")
    repo.branches["main"] = repo.add_commit(first, "n", {**first.files, "notes.txt": Blob(b"12345", False)}).oid
    assert download_size([resolve("alice/grown", download=False)]) == 5
    assert download_size([resolve("alice/grown")]) == 0


def test_a_token_the_hub_does_not_know(hub, model):
    hub.add_repo("alice/any", contents(model))
    with pytest.raises(HubError, match="The Hub does not accept your token") as caught:
        resolve("alice/any", token="hf_of_nobody")
    assert "hf_of_nobody" not in str(caught.value)


def test_a_gated_model_whose_terms_were_accepted(hub, model):
    repo = hub.add_repo("bob/open-gate", contents(model), gated=True)
    hub.add_user("carol", "token-of-carol")
    with pytest.raises(HubError, match=r"bob/open-gate is gated: accept its terms at .* and wait for access"):
        resolve("bob/open-gate", token="token-of-carol")
    repo.granted.add("carol")
    assert resolve("bob/open-gate", token="token-of-carol").kind == "full"


def test_invalid_ids_are_not_asked_of_the_hub(hub):
    with pytest.raises(CheckpointError, match="neither a folder nor a valid Hub id"):
        resolve("-bad--name-")
    assert hub.requests == []


def test_each_spec_is_looked_up_once(hub, model):
    hub.add_repo("alice/twice", contents(model))
    first, local, again = resolve_all(["alice/twice", str(model), "alice/twice"])
    assert first == again
    assert local.repo_id is None
    assert len(hub.sent("GET", r"/api/models/alice/twice/(revision|tree)")) <= 2


def test_the_missing_part_of_a_pair_is_named_with_the_pair(hub, model):
    with pytest.raises(
        HubError, match=r"is read as the model .* with the adapter 'org/lora'\. There is no model 'org/lora'"
    ):
        resolve_all([f"{model}+org/lora"], pairs=True)


# Offline, in a fresh process, since the Hub client reads HF_HUB_OFFLINE when it is imported

_SCRIPT = """
import json, sys
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.errors import MergeError
answers = []
for spec in sys.argv[1:]:
    try:
        source = resolve(spec)
        answers.append([source.repo_id, source.revision, source.commit, len(open_checkpoint(source).tensors)])
    except MergeError as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


def resolve_offline(home: Path, specs: list[str]) -> list:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _SCRIPT, *specs]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


def test_offline_cache(tmp_path, model):
    sha, other = "a" * 40, "b" * 40
    cache = tmp_path / "home" / "hub"
    for repo, commit, files in (
        ("complete", sha, contents(model)),
        ("partial", other, {"config.json": b"{}"}),
    ):
        root = cache / f"models--org--{repo}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        (root / "blobs").mkdir()
        (root / "snapshots" / commit).mkdir(parents=True)
        for name, data in files.items():
            (root / "blobs" / f"etag-{name}").write_bytes(data)
            (root / "snapshots" / commit / name).symlink_to(f"../../blobs/etag-{name}")
    specs = [
        "org/complete",
        f"org/complete@{sha}",
        "org/complete@main",
        "org/complete@v9",
        "org/absent",
        "org/partial",
    ]
    answers = resolve_offline(tmp_path / "home", specs)
    n_tensors = len(open_checkpoint(resolve(str(model))).tensors)
    assert answers[:3] == [["org/complete", revision, sha, n_tensors] for revision in (None, sha, "main")]
    for spec, answer in zip(specs[3:], answers[3:], strict=True):
        assert answer.startswith(f"HubError: '{spec}' is neither a local folder nor in the local cache"), answer
        assert "HF_HUB_OFFLINE" in answer


def test_offline_snapshot_that_lacks_only_what_a_merge_can_do_without(hub, tmp_path, model):
    repo = hub.add_repo("alice/seen", {**contents(model), "README.md": b"# Card"})
    repo.branches["index-only"] = repo.add_commit(repo.commit_of("main"), "n", dict(repo.commit_of("main").files)).oid
    cache = tmp_path / "home" / "hub"
    snapshot_download("alice/seen", cache_dir=cache, allow_patterns=["*.safetensors", "config.json"])
    snapshot_download("alice/seen", revision="index-only", cache_dir=cache, allow_patterns=["config.json"])
    actual, bare = resolve_offline(tmp_path / "home", ["alice/seen", "alice/seen@index-only"])
    assert actual[2] == repo.branches["main"]
    assert bare.startswith("HubError: 'alice/seen@index-only' is neither a local folder nor in the local cache")


def test_local_folders_need_no_hub_client(model):
    program = (
        "import sys; from hf_frmerge.checkpoints.tensors.reader import open_checkpoint; "
        "from hf_frmerge.checkpoints.resolve import resolve; "
        "from hf_frmerge.checkpoints.alignment.align import align; "
        "from hf_frmerge.checkpoints.beside import donor; from hf_frmerge.checkpoints.tensors import writer; "
        "c = open_checkpoint(resolve(sys.argv[1])); align([c, c]); c.read('model.norm.weight'); "
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'fsspec', 'safetensors'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
