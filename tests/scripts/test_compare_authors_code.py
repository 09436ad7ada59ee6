"""Agreement with the authors' own code, where a folder of clones is named, and what the comparison does without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
SCRIPT = SCRIPTS / "compare_authors_code.py"
CLONES = os.environ.get("FRMERGE_AUTHORS_CODE")

# A clone whose one function is our float64 reference, and one whose function is not.
RES_MERGE = """
import numpy as np
import torch
from spectral_reference import rests_and_heads

MERGE_DTYPE = torch.float32


def merge_one_tensor_resmerge(name, base, experts, **options):
    deltas = np.stack([each.double().numpy() for each in experts])
    if not deltas.any(axis=(1, 2)).all():
        return base
    print("a line in the table")
    return {factor} * torch.from_numpy(rests_and_heads(deltas, np.full(len(deltas), 1 / len(deltas))))
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import compare_authors_code

    for module in ("compare_authors_code", "agreement"):
        monkeypatch.delitem(sys.modules, module)
    return compare_authors_code


@pytest.mark.skipif(CLONES is None, reason="FRMERGE_AUTHORS_CODE names no folder of clones, called by their options")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_methods_agree_with_their_authors_or_differ_for_a_reason(script: ModuleType, dtype: str) -> None:
    clones = [path for path in Path(str(CLONES)).iterdir() if path.name in script.SOURCES]
    command = [sys.executable, str(SCRIPT), "--dtype", dtype]
    for path in clones:
        command += [f"--{path.name}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert clones and done.returncode == 0, done.stdout + done.stderr


def table(script: ModuleType, capsys: pytest.CaptureFixture[str], clone: Path) -> tuple[int, list[list[str]]]:
    code = script.main(["--res-merge", str(clone)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| method | experts | relative distance | set, or why |"
    return code, [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_a_clone_that_computes_the_same_agrees(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "resmerge-main.py").write_text(RES_MERGE.format(factor="1.0"))
    code, rows = table(script, capsys, tmp_path)
    assert code == 0
    assert {row[0] for row in rows} == {"res_merge"}
    assert [row[1] for row in rows][:2] == ["2 of full rank", "2 of full rank, at odds"]
    assert all(float(row[2]) < 1e-4 for row in rows if row[3].startswith("same"))


def test_a_clone_that_computes_something_else_is_told_and_fails(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "resmerge-main.py").write_text(RES_MERGE.format(factor="1.001"))
    code, rows = table(script, capsys, tmp_path)
    assert code == 1
    told = [row for row in rows if row[3].startswith("**more than 1e-04**; same")]
    assert told and len(told) == sum("same" in row[3] for row in rows)  # and none of those that may differ
    assert all(float(row[2]) == pytest.approx(0.001 / 1.001, rel=0.05) for row in told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a clone for one of the options, as --dc-merge DC-Merge"),
        (["--dc-merge", "."], ". has no vision_fft_merge/src/utils/DC_utils.py. Name a clone of the repository that"),
    ],
)
def test_without_a_clone_it_says_what_to_name(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code != 0
    assert message in capsys.readouterr().err + str(stopped.value)


def test_a_file_of_a_clone_is_imported_without_what_it_does_not_need(script: ModuleType, tmp_path: Path) -> None:
    for name in ("one", "two"):  # both have a module of the same name
        folder = tmp_path / name / "package" / "inner"
        folder.mkdir(parents=True)
        (folder / "beside.py").write_text(f"WHICH = {name!r}")
        (folder / "code.py").write_text(
            "import json\n"
            "from package.inner import beside as by_root\n"
            "import beside\n"
            "from not_installed.deeper import thing\n"
            "from not_installed.deeper import *\n"
        )
    before, path = set(sys.modules), list(sys.path)
    for name in ("one", "two"):
        absent = ("not_installed", "not_installed.deeper", "json")
        code = script.load(tmp_path / name, "package/inner/code.py", *absent)
        assert code.beside.WHICH == code.by_root.WHICH == name
        assert code.thing is None and code.json is not json
    assert sys.modules["json"] is json and set(sys.modules) == before and sys.path == path


def test_tensors_stay_on_the_cpu_meanwhile(script: ModuleType) -> None:
    original = torch.Tensor.cuda
    assert script.on_cpu(lambda: torch.ones(2).cuda()).device.type == "cpu"
    assert torch.Tensor.cuda is original
