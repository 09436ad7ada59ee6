"""
Every block of code in the documentation and in docstrings is run: what a person copies works as it stands.

Commands and Python run in one empty folder a document, against the tests' Hub. There `org/base`, `org/math` and
`org/code` are tiny models, `./lora-chat` is an adapter of the base, `heldout.txt` a text, `config.yml` a merge, and
who is logged in is `me`. Documentation that uses other names cannot be run, and fails.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click_runner import click_runner
from hub_server import HubServer
from peft import LoraConfig, get_peft_model
from project_file import PYPROJECT
from tiny_models import save_llama_family
from transformers import LlamaForCausalLM

import hf_frmerge
from hf_frmerge.cli.main import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS = [path for path in DOCUMENTS if path.exists()] + sorted((ROOT / "docs").glob("*.md"))
PROJECT = PYPROJECT["project"]

TEXT = "the house of wisdom has many rooms and each room opens on another house "
# Commands that take minutes: it is only checked that they would start.
LONG = {"demo", "compare", "search"}
NOT_CODE = {"bibtex", "mermaid"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, what it is written in, and the output shown below it."""

    path: Path
    line: int
    language: str
    code: str
    output: str | None = None

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """Blocks of a document, each `text` block taken as the output of the one before it."""
    text = path.read_text(encoding="utf-8")
    actual: list[Block] = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        if match[1] == "text" and actual and actual[-1].output is None:
            last = actual.pop()
            actual.append(Block(path, last.line, last.language, last.code, match[2]))
        else:
            actual.append(Block(path, line, match[1], match[2]))
    return actual


def docstring_blocks() -> Iterator[Block]:
    """Python blocks in the docstrings of the package."""
    for path in sorted((ROOT / "hf_frmerge").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
                    yield Block(path, getattr(node, "lineno", 1), "python", match[1])


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_llama_family(root, TEXT.split(), 0.02, eos_token="</s>")  # experts write behind it
    base = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(root / "lora-chat", save_embedding_layers=False)
    return root


@pytest.fixture
def folder(models: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader sits: an empty folder but for what the documentation names."""
    for name in ("base", "math", "code"):
        hub.add_repo(f"org/{name}", {path.name: path.read_bytes() for path in (models / name).iterdir()})
    hub.add_user("me", "hf_of_me")
    monkeypatch.setenv("HF_TOKEN", "hf_of_me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora-chat").symlink_to(models / "lora-chat")
    (tmp_path / "heldout.txt").write_text(TEXT * 8, encoding="utf-8")
    (tmp_path / "config.yml").write_text("experts: [org/math, org/code]\noutput_dir: from-config\n", encoding="utf-8")
    return tmp_path


def test_documents_hold_no_code_that_is_not_run() -> None:
    actual = [block for path in DOCUMENTS for block in blocks_of(path)]
    assert sum(block.language == "bash" for block in actual) >= 3
    unknown = [block.place for block in actual if block.language not in {"python", "bash", *NOT_CODE}]
    assert unknown == [], "say in which language these blocks are"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_of_a_document(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks_of(path):
        if block.language != "python":
            continue
        capsys.readouterr()
        exec(compile("from __future__ import annotations\n" + block.code, block.place, "exec"), names)
        check_output(capsys.readouterr().out, block)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_a_document(path: Path, folder: Path) -> None:
    for block in blocks_of(path):
        if block.language != "bash":
            continue
        printed = ""
        for words in commands(block.code):
            printed = run(words, block.place)
        check_output(printed, block)


@pytest.mark.parametrize("block", list(docstring_blocks()), ids=lambda block: block.place)
def test_code_of_a_docstring(block: Block, folder: Path) -> None:
    module = importlib.import_module(".".join(block.path.relative_to(ROOT).with_suffix("").parts))
    names = {name: getattr(hf_frmerge, name) for name in hf_frmerge.__all__} | vars(module)
    names["merger"] = hf_frmerge.FisherRaoMerger(["org/math", "org/code"])
    if ">>>" not in block.code:
        exec(compile(block.code, block.place, "exec"), names)
        return
    case = doctest.DocTestParser().get_doctest(block.code, names, block.place, str(block.path), block.line)
    report: list[str] = []
    failed = doctest.DocTestRunner(verbose=False).run(case, out=report.append).failed
    assert not failed, "".join(report)


def check_output(printed: str, block: Block) -> None:
    """What a document shows must be the last that is printed; before it there may be logs, whose seconds vary."""
    if block.output is not None:
        shown = block.output.strip().splitlines()
        assert printed.strip().splitlines()[-len(shown) :] == shown, block.place


def commands(code: str) -> list[list[str]]:
    """Words of every command: continued lines joined, comments dropped, `&&` taken apart."""
    actual = []
    for line in code.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&":
                actual += [words] if words else []
                words = []
            else:
                words.append(word)
    return actual


def run(words: list[str], place: str) -> str:
    """Run one command of a document as far as a test can; return what it prints."""
    program, *arguments = words
    if program == "frmerge":
        return run_frmerge(arguments, place)
    if program == "bash":
        assert subprocess.run(["bash", "-n", ROOT / arguments[0]], check=False).returncode == 0, f"{place}: {words}"
    elif program == "pip":
        check_pip(arguments, place)
    elif Path(program).name in {"ruff", "mypy", "pytest"}:
        assert any(need.startswith(Path(program).name) for need in PROJECT["optional-dependencies"]["dev"]), place
    else:
        pytest.fail(f"{place}: nobody knows how to check {shlex.join(words)}")
    return ""


def run_frmerge(arguments: list[str], place: str) -> str:
    context = click.Context(main)
    command = main.get_command(context, arguments[0])
    assert command is not None, f"{place}: there is no command frmerge {arguments[0]}"
    command.make_context(arguments[0], [word for word in arguments[1:] if word != "..."], parent=context)
    if arguments[0] in LONG or "..." in arguments:
        return ""
    done = click_runner().invoke(main, arguments)
    assert done.exit_code == 0, f"{place}: frmerge {shlex.join(arguments)}\n{done.output}"
    return done.stdout


def check_pip(arguments: list[str], place: str) -> None:
    assert arguments[0] == "install", place
    words = iter(arguments[1:])
    for word in words:
        if word == "-c":
            assert (ROOT / next(words)).is_file(), place
        for extra in re.findall(r"\[([\w,-]+)\]", word):
            unknown = set(extra.split(",")) - PROJECT["optional-dependencies"].keys()
            assert not unknown, f"{place}: there is no extra {unknown}"


def test_the_words_of_refusals_are_those_of_the_code() -> None:
    written: list[str] = []
    for path in (ROOT / "hf_frmerge").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        written += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    text = (ROOT / "docs/inputs.md").read_text(encoding="utf-8")
    quoted = re.findall(r'"([^"\n]{8,})"', text)
    # What the code fills in: names, numbers, dtypes, and what is not quoted.
    parts = [part.strip(" .,;:()") for quote in quoted for part in re.split(r"'[^']*'|…|\d+|\b[BF]+\d*\b", quote)]
    checked = [part for part in parts if len(part) > 3]
    assert len(checked) > 30
    assert [part for part in checked if not any(part in each for each in written)] == []
