"""What is released: lower bounds that were tested, a source distribution that builds, wheels with and without C."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from project_file import PYPROJECT

ROOT = Path(__file__).parents[1]
PROJECT = PYPROJECT["project"]
ABI = "abi3" if sys.version_info >= (3, 11) else "cpython-310.*"
EXTENSION = re.compile(rf"hf_frmerge/kernels/_native\.{ABI}\.(so|pyd)")


def lower_bounds(requirements: list[str]) -> dict[str, Version]:
    bounds = {}
    for requirement in map(Requirement, requirements):
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                bounds[requirement.name.lower().replace("-", "_")] = Version(specifier.version)
    return bounds


def test_lower_bounds_are_the_versions_that_are_tested() -> None:
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-min.txt").read_text(), re.MULTILINE)
    tested = {name.lower().replace("-", "_"): Version(version) for name, version in pins}
    needed = lower_bounds(PROJECT["dependencies"])
    assert len(needed) == len(PROJECT["dependencies"])  # everything has one
    # GGUF files, of which the demo reads one, need newer versions than a merge does: they are tested with those of
    # constraints.txt.
    extras = [lower_bounds(extra) for name, extra in PROJECT["optional-dependencies"].items() if name != "gguf"]
    for bounds in (needed, *extras):
        assert {name: version for name, version in bounds.items() if name in tested} == {
            name: tested[name] for name in bounds if name in tested
        }
    assert needed.keys() <= tested.keys()
    for name in ("fast", "pareto", "report", "tensorboard"):
        assert lower_bounds(PROJECT["optional-dependencies"][name]).keys() <= tested.keys()


def is_data(path: Path) -> bool:
    """Whether a file of the package is neither Python nor C, so that only pyproject.toml brings it into a wheel."""
    return path.is_file() and path.suffix not in (".py", ".c", ".h")


def build(source: Path, out: Path, what: str, **environment: str) -> Path:
    """Build a `sdist` or `wheel` with the setuptools that is here, as pip would with its own."""
    program = f"from setuptools import build_meta; print(build_meta.build_{what}({str(out)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return out / run.stdout.strip().splitlines()[-1]


def run_installed(folder: Path, program: str) -> str:
    command = [sys.executable, "-c", f"import hf_frmerge; assert {str(folder)!r} in hf_frmerge.__file__; {program}"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.strip()


@pytest.mark.slow
def test_the_source_distribution_builds_with_a_compiler_and_without(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    sdist = build(tmp_path / "checkout", tmp_path, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "constraints-min.txt", "tests/hub_server/server.py"):
        assert (source / name).is_file(), name
    package = tmp_path / "checkout" / "hf_frmerge"
    data = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if is_data(path)}
    assert {"hf_frmerge/py.typed", "hf_frmerge/demo/data/austen.txt"} < data

    if shutil.which(os.environ.get("CC", "cc")) is not None:
        with zipfile.ZipFile(build(source, tmp_path, "wheel")) as wheel:
            names = set(wheel.namelist())
        assert data <= names
        assert any(map(EXTENSION.fullmatch, names))
        assert not any(name.startswith(("tests/", "scripts/")) for name in names)
        for leftover in ("build", "hf_frmerge.egg-info"):
            shutil.rmtree(source / leftover, ignore_errors=True)

    with zipfile.ZipFile(build(source, tmp_path, "wheel", CC="false", CXX="false")) as wheel:
        assert not any(map(EXTENSION.fullmatch, wheel.namelist()))
        wheel.extractall(tmp_path / "pure")
    program = (
        "from hf_frmerge.demo.texts import expert_dirs; "
        "from hf_frmerge import FisherRaoMerger as M, MergingArguments as A; "
        "from hf_frmerge.kernels.load import load_kernels; "
        "args = A(output_dir='out', disable_tqdm=True); "
        "merger = M([str(folder) for folder in expert_dirs().values()], args).merge(); "
        "print(load_kernels().name, merger.report['n_merged'])"
    )
    assert re.search(r"torch.* 210$", run_installed(tmp_path / "pure", program))
