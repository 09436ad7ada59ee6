"""Imports point down only, between the rooms of the package and inside a room, and there are no circles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

# From the ground up. Rooms of one floor do not import each other.
FLOORS = [
    ["visible"],
    ["errors"],
    ["geometry", "kernels"],
    ["checkpoints"],
    ["methods"],
    ["merging"],
    ["evaluation", "extraction", "weighting"],
    ["fisher", "provenance", "wording"],
    ["calibration", "training"],
    ["hub", "report"],
    ["merger", "comparison"],
    ["demo", "search"],
    ["cli"],
]

# Inside a room, the folders and the files beside them.
ROOMS = {
    "checkpoints": [
        ["disk", "json_text", "page_cache", "remote_output", "model_structure"],
        ["modules_file"],
        ["lock", "local_folder", "remote_folder"],
        ["source"],
        ["hub", "gguf"],
        ["folders"],
        ["resolve"],
        ["names"],
        ["tensors"],
        ["alignment"],
        ["vocabularies"],
        ["quantised"],
        ["adapters", "beside"],
    ],
    "merging": [
        ["arguments"],
        ["planning", "decisions"],
        ["operands"],
        ["engine"],
        ["outputs", "record"],
        ["callbacks", "output_folder"],
        ["run", "inspection"],
    ],
    "evaluation": [["record"], ["headlines", "models", "weakest"], ["text"], ["measures"], ["suite", "bridges"]],
    "hub": [["card"], ["check_plan", "outgoing"], ["push"]],
    "cli": [
        ["command", "render"],
        ["evaluating", "options"],
        [
            "compare",
            "demo",
            "diff",
            "evaluate",
            "extract",
            "merge",
            "output",
            "preflight",
            "report",
            "reproduce",
            "search",
        ],
        ["main"],
    ],
}
PACKAGE = Path(__file__).resolve().parents[1] / "hf_frmerge"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")  # the front door sees every room


def name_of(path: Path) -> str:
    """`checkpoints.hub.find` for a file of the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in MODULES}


def modules_imported(source: str) -> set[str]:
    """Modules of the package that a module imports anywhere, also inside functions and for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides the room it reaches"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)  # `from hf_frmerge import kernels`
    inside = {name.removeprefix("hf_frmerge.") for name in names if name.startswith("hf_frmerge.")} - {"__version__"}
    return {_module(name) for name in inside}


def _module(name: str) -> str:
    """The module of a name in it."""
    while name not in NAMES and "." in name:
        name = name.rpartition(".")[0]
    return name


IMPORTS = {name_of(path): modules_imported(path.read_text(encoding="utf-8")) - {name_of(path)} for path in MODULES}


def floor_of(place: str, floors: list[list[str]]) -> int:
    actual = [number for number, places in enumerate(floors) if place in places]
    assert actual, f"{place} is on no floor: add it to the list"
    return actual[0]


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_point_down_between_rooms(module: str) -> None:
    room = module.split(".")[0]
    for other in {name.split(".")[0] for name in IMPORTS[module]} - {room}:
        assert floor_of(other, FLOORS) < floor_of(room, FLOORS), f"{module} imports from {other}"


@pytest.mark.parametrize("module", [name for name in IMPORTS if name.split(".")[0] in ROOMS and "." in name])
def test_imports_point_down_inside_a_room(module: str) -> None:
    room, inner = module.split(".")[:2]
    others = {name.split(".")[1] for name in IMPORTS[module] if name.startswith(f"{room}.")}
    for other in others - {inner}:
        assert floor_of(other, ROOMS[room]) < floor_of(inner, ROOMS[room]), f"{module} imports from {room}.{other}"


def test_there_are_no_circles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(IMPORTS.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


def test_every_import_is_seen() -> None:
    source = (
        "import hf_frmerge.merger\ndef f():\n    from hf_frmerge.hub.push import push\n    from hf_frmerge import cli"
    )
    assert modules_imported(source) == {"merger", "hub.push", "cli"}
    with pytest.raises(AssertionError, match="relative import"):
        modules_imported("from .kernels import native")
