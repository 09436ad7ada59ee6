"""`frmerge reproduce` and `frmerge diff`: what they print, and their exit codes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from hub_server import ALICE_TOKEN, HubServer

Frmerge = Callable[..., Result]


def test_reproduce_says_identical_and_keeps_the_model_if_asked(frmerge: Frmerge, models, tmp_path: Path) -> None:
    frmerge("merge", *models.experts, "--output-dir", tmp_path / "out", "--beta", "0.5", "--weights", "3,1")
    done = frmerge("reproduce", tmp_path / "out", "--output-dir", tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    assert "identical bit for bit: 20 tensors" in " ".join(done.stdout.split()) and "Merging" not in done.stdout
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert (tmp_path / "again" / "README.md").is_file()
    assert frmerge("diff", tmp_path / "out", tmp_path / "again").exit_code == 0
    assert frmerge("verify", tmp_path / "again").exit_code == 0


def test_reproduce_exits_with_1_if_a_bit_is_another(frmerge: Frmerge, models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    frmerge("merge", *models.experts, "--output-dir", out)
    (out / ".frmerge_sources.json").unlink()
    lost = frmerge("reproduce", out)
    assert lost.exit_code == 1 and "--expert NAME=PATH" in lost.stderr
    right = ["--expert", f"math={models.math}", "--expert", f"code={models.code}"]
    assert json.loads(frmerge("reproduce", out, *right, "--json").stdout)["identical"] is True
    swapped = frmerge("reproduce", out, "--expert", f"math={models.code}", "--expert", f"code={models.math}")
    assert swapped.exit_code == 1
    text = " ".join(swapped.stdout.split())
    assert "is not the same" in text and "math is not what was merged then" in text
    assert frmerge("reproduce", out, "--expert", "math").exit_code == 2
    assert frmerge("reproduce", tmp_path).exit_code == 1


def test_diff_is_read_from_left_to_right(frmerge: Frmerge, models, tmp_path: Path) -> None:
    for name, weights in (("a", "1,1"), ("b", "3,1")):
        frmerge("merge", *models.experts, "--output-dir", tmp_path / name, "--weights", weights)
    done = frmerge("diff", tmp_path / "a", tmp_path / "b")
    assert done.exit_code == 1, done.stderr
    text = " ".join(done.stdout.split())
    assert "math: weight │ 0.5 │ 0.75" in text and "20 of 20 tensors differ" in text
    actual = json.loads(frmerge("diff", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert actual["same_model"] is False and len(actual["different_tensors"]) == 20
    assert frmerge("diff", tmp_path / "a", tmp_path).exit_code == 1


def test_verify_records_checksums(frmerge: Frmerge, models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    frmerge("merge", *models.experts, "--output-dir", out)
    assert frmerge("verify", out, "--sha256").exit_code == 0


def test_from_the_hub_to_the_hub_and_made_again(
    frmerge: Frmerge, models, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "math", "adapter"):
        folder = Path(getattr(models, name))
        hub.add_repo(f"lab/{name}", {path.name: path.read_bytes() for path in folder.iterdir()})
    monkeypatch.setenv("HF_TOKEN", ALICE_TOKEN)
    out = tmp_path / "out"
    push = ["--push-to-hub", "--hub-model-id", "alice/mixed", "--hub-private-repo"]
    merged = frmerge("merge", "lab/math", "lab/adapter", "--base-model", "lab/base", "--output-dir", out, *push)
    assert merged.exit_code == 0, merged.stderr
    pushed = json.loads(hub.repos["models", "alice/mixed"].commit_of("main").files["merge_manifest.json"].data)
    assert all(len(entry["sha256"]) == 64 for entry in pushed["files"].values())
    for command in (["reproduce"], ["verify"], ["diff", out]):
        done = frmerge(*command, "alice/mixed")
        assert done.exit_code == 0, (command, done.output)
    card = (out / "README.md").read_text()
    assert "frmerge reproduce alice/mixed\n" in card and "frmerge verify alice/mixed\n" in card


def test_every_command_of_a_pushed_card_runs_as_it_stands(
    frmerge: Frmerge, models, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "math"):
        folder = Path(getattr(models, name))
        hub.add_repo(f"lab/{name}", {path.name: path.read_bytes() for path in folder.iterdir()})
    monkeypatch.setenv("HF_TOKEN", ALICE_TOKEN)
    options = ["--base-model", "lab/base", "--weights", "3,1", "--beta", "0.5", "--output-dir", tmp_path / "out"]
    done = frmerge("merge", "lab/math", models.adapter, *options, "--push-to-hub", "--hub-model-id", "alice/mixed")
    assert done.exit_code == 0, done.stderr
    (tmp_path / "reader").mkdir()
    monkeypatch.chdir(tmp_path / "reader")
    Path("adapter").symlink_to(models.adapter)  # the local source, under the name the card calls it by
    card = hub.repos["models", "alice/mixed"].commit_of("main").files["README.md"].data.decode()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", card, re.DOTALL) for line in lines(block)]
    assert [words[:2] for words in commands if words[0] == "frmerge"] == [
        ["frmerge", "reproduce"], ["frmerge", "merge"], ["frmerge", "verify"],
    ]  # fmt: skip
    for words in commands:
        if words[0] == "frmerge":
            result = frmerge(*words[1:])
            assert result.exit_code == 0, (words, result.output)
    assert frmerge("diff", "merged", "alice/mixed").exit_code == 0


def lines(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def test_a_push_writes_the_card_for_the_model_as_it_will_be_called(
    frmerge: Frmerge, models, hub: HubServer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    frmerge("merge", *models.experts, "--output-dir", out)
    assert 'from_pretrained("./out")' in (out / "README.md").read_text()

    def pushed() -> str:
        done = frmerge("push", out, "reader", "--token", ALICE_TOKEN)
        assert done.exit_code == 0, done.output
        return hub.repos["models", "alice/reader"].commit_of("main").files["README.md"].data.decode()

    card = pushed()
    assert 'from_pretrained("alice/reader")' in card and "frmerge reproduce alice/reader" in card
    assert frmerge("card", out, "--hub-model-id", "alice/reader").exit_code == 0
    assert (out / "README.md").read_text() == card
    (out / "README.md").write_text("# My own words\n")
    assert pushed() == "# My own words\n"
