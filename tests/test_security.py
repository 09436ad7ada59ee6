"""SECURITY.md: every promise names tests, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_test_it_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) == TEXT.count("- `tests/") > 30 and len(set(named)) == len(named)
    for file, function in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, function)


def test_every_promise_names_tests() -> None:
    promises = TEXT.partition("## What is promised")[2].partition("## What is not promised")[0].split("\n**")[1:]
    assert len(promises) == 6 and all("- `tests/" in promise for promise in promises)


# Tests of the doors by which what others wrote comes in: all of them are named.
DOORS = (
    "tests/attack/test_attacks.py",
    "tests/checkpoints/adapters/test_patterns.py",
    "tests/checkpoints/test_json_text.py",
    "tests/checkpoints/test_local_folder.py",
    "tests/merging/record/test_check_types.py",
)


def test_every_test_of_a_door_is_named() -> None:
    for file in DOORS:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        assert tests and all(f"`{file}::{name}`" in TEXT for name in tests), file
