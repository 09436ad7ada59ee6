"""`modules.json` of sentence-transformers: the modules that turn a model's outputs into an embedding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.errors import CheckpointError

MODULES_FILE = "modules.json"


@dataclass(frozen=True, slots=True)
class Module:
    """One module: the name of its class without the package, and the folder of its files ("" for the model's own)."""

    kind: str
    path: str


def parse_modules(content: bytes, spec: str) -> list[Module]:
    """
    Parse the contents of `modules.json`.

    Raises:
        CheckpointError: If it is not a list of modules, or names a folder outside of the model's.
    """
    try:
        modules = [
            Module(str(entry["type"]).rpartition(".")[2], str(entry["path"]).rstrip("/"))
            for entry in parse_json(content)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{spec!r}: {MODULES_FILE} makes no sense: {error!r}. Download it again.") from error
    for module in modules:
        path = PurePosixPath(module.path)
        if path.is_absolute() or ".." in path.parts or "\\" in module.path or ":" in module.path:
            raise CheckpointError(
                f"{spec!r}: {MODULES_FILE} names {module.path!r}, which is no folder inside the model's. Nothing "
                "outside is read."
            )
    return modules
