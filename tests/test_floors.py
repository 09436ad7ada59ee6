"""Imports point down only: no module may import from a higher floor, or from another room of its own floor."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FLOORS = [
    ["errors"],
    ["geometry", "kernels"],
    ["checkpoints"],
    ["methods"],
    ["merging"],
    ["weighting", "fisher", "evaluation"],
    ["wording"],
    ["hub", "report"],
    ["merger"],
    ["demo"],
    ["cli"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PACKAGE = Path(__file__).resolve().parents[1] / "hf_frmerge"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")  # the front door sees every room


def rooms_imported(source: str) -> set[str]:
    """Rooms of the package that a module imports anywhere, also inside functions and for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides the room it reaches"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)  # `from hf_frmerge import kernels`
    return {name.split(".")[1] for name in names if name.startswith("hf_frmerge.")} - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in rooms_imported(path.read_text(encoding="utf-8")) - {room}:
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} (floor {FLOOR_OF[room]}) imports {other} ({FLOOR_OF[other]})"


def test_every_import_is_seen() -> None:
    source = (
        "import hf_frmerge.merger\ndef f():\n    from hf_frmerge.hub.push import push\n    from hf_frmerge import cli"
    )
    assert rooms_imported(source) == {"merger", "hub", "cli"}
    with pytest.raises(AssertionError, match="relative import"):
        rooms_imported("from .kernels import native")
