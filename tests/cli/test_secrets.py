"""Tokens and passwords are never printed, and the command line says that it is no place for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from hf_frmerge.errors import MergeError
from hf_frmerge.visible import without_secrets

Frmerge = Callable[..., Result]

TOKEN = "hf_" + "SECRET" * 6
CONFIGS = {
    "of a wrong type": ("json", json.dumps({"experts": ["a", "b"], "hub_token": [TOKEN, "hf_SECRET"]})),
    "on a broken line": ("yaml", "experts: [a, b]\nhub_token: hf_SECRET: x\n"),
    "under a wrong name": ("yaml", "experts: [a, b]\nhub_tokn: hf_SECRET\n"),
}


@pytest.mark.parametrize(("suffix", "text"), CONFIGS.values(), ids=CONFIGS)
def test_a_token_in_a_configuration_file_with_a_mistake(
    frmerge: Frmerge, tmp_path: Path, suffix: str, text: str
) -> None:
    config = tmp_path / f"merge.{suffix}"
    config.write_text(text, encoding="utf-8")
    result = frmerge("merge", config)
    assert result.exit_code == 2 and "Error: " in result.stderr
    assert "SECRET" not in result.stdout + result.stderr


def test_a_token_in_the_wrong_place(frmerge: Frmerge, models) -> None:
    result = frmerge("push", models.math, "me/model", TOKEN)
    assert result.exit_code == 2 and "unexpected extra argument (hf_…)" in result.stderr


@pytest.mark.parametrize("option", [("merge", "--hub-token"), ("push", "--token"), ("reproduce", "--token")])
def test_a_token_on_the_command_line_is_warned_of_once(frmerge: Frmerge, models, option: tuple[str, str]) -> None:
    command, flag = option
    assert "HF_TOKEN" in frmerge(command, "--help").stdout
    result = frmerge(command, models.math, "nowhere/such", flag, TOKEN)
    assert result.exit_code in (1, 2)
    assert result.stderr.count(f"Warning: {flag} shows your token to everyone") == 1
    assert TOKEN not in result.stdout + result.stderr
    assert "Warning" not in frmerge(command, models.math, "nowhere/such").stderr


def test_a_token_that_can_be_none_is_named_not_printed() -> None:
    """Not ASCII, from the environment: what the Hub's client raises names a codec."""
    environment = os.environ | {"HF_TOKEN": "hf_SECRETé", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [str(Path(sys.executable).parent / "frmerge"), "plan", "org/model", "org/other"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The token for the Hub has a character that no token has. ")
    assert "SECRET" not in done.stdout + done.stderr


def test_what_gives_access_is_left_out_of_texts() -> None:
    shown = {
        "s3://key:secret@bucket/m": "s3://…@bucket/m",
        "'https://secret@host/m'": "'https://…@host/m'",
        "https://me:se@cr:et@host/m, b@c": "https://…@host/m, b@c",
        "https://host/m?X-Amz-Signature=secret&a=b is gone": "https://host/m?… is gone",
        f"token={TOKEN}.": "token=hf_….",
        "hub://gpt2@0123abc and hub://org/m@0123": "hub://gpt2@0123abc and hub://org/m@0123",
        "org/name@main, hf_frmerge, a?b": "org/name@main, hf_frmerge, a?b",
    }
    assert {text: without_secrets(text) for text in shown} == shown
    assert str(MergeError("no s3://key:secret@bucket/m")) == "no s3://…@bucket/m"
