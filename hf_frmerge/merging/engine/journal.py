"""What a merge has finished so far, one JSON line each, so that a killed one goes on where it stopped."""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.disk import create_file, disk_errors, rename
from hf_frmerge.errors import MergeError, ResumeError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.solve import Geometry, Solution

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.merging.planning.plan import MergePlan

logger = logging.getLogger(__name__)

_AFTER_RECORD = len(', ""]\n') + 32  # bytes of a line after its record: a digest of 32 hexadecimal digits

# Options that do not change a bit of the output: a merge may be resumed with others.
_FREE_OPTIONS = frozenset(
    {
        "output_dir",
        "overwrite",
        "resume_from_checkpoint",
        "allow_license",
        "strict",
        "stream_from_hub",
        "memory_budget",
        "num_workers",
        "device",
    }
)


def result_options() -> list[str]:
    """Return the names of the options that can change a bit of the output."""
    names = [f.name for f in fields(MergingArguments)]
    return [name for name in names[: names.index("run_name")] if name not in _FREE_OPTIONS]


def fingerprint(plan: MergePlan, kernels: str) -> dict[str, Any]:
    """Return everything the output depends on and that can be told without reading weights, part by part."""
    options = plan.args.to_dict()
    parts: dict[str, Any] = {f"option {name}": options[name] for name in result_options()}
    parts["weights"] = plan.weights
    parts["compute kernels"] = kernels
    models = [(f"expert {index + 1}", expert) for index, expert in enumerate(plan.experts)]
    for role, model in [*models, *([("base model", plan.base)] if plan.base else [])]:
        parts[role] = {"spec": model.spec, "files": model.weights.files}
    return parts


def modification_marks(plan: MergePlan) -> dict[str, Any]:
    """Return a cheap mark of every weight file that changes when it is rewritten, by model."""
    return {model.spec: model.weights.fingerprint() for model in plan.models}


class Journal:
    """
    Append-only record of a merge.

    A line is a JSON array of a record and its XXH3-128 digest. Lines count up to the first that is torn or altered: a
    kill leaves one behind, and what was recorded after it is computed again. Nothing here is trusted on its own:
    finished bytes are digested again before they are kept.
    """

    def __init__(
        self, folder: Path, rank: int, header: dict[str, Any], marks: dict[str, Any], *, resume: bool
    ) -> None:
        """
        Read what is there, and write nothing before `start`.

        Args:
            folder: Staging folder of the output.
            rank: Number of the process, each of which writes its own file.
            header: `fingerprint` of the merge.
            marks: `modification_marks` of its inputs.
            resume: Whether to load what is there. Files of all processes count: there may have been more last time.

        Raises:
            ResumeError: If an earlier merge there was started differently; the message says what changed.
        """
        self.solved: dict[str, tuple[Solution, dict[str, dict[str, str]]]] = {}
        self.written: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._path = folder / f"journal-{rank}.jsonl"
        self._first = {"kind": "merge", "marks": marks, **header}
        loaded = {path: self._load(path, header, marks) for path in sorted(folder.glob("journal-*.jsonl")) if resume}
        self._whole = loaded.get(self._path, b"")

    def start(self) -> None:
        """Write this process's file anew, with its whole lines; all processes must have read it before."""
        unfinished = self._path.with_name(f"{self._path.name}.partial")
        with disk_errors(self._path, "created"):
            self._file = os.fdopen(create_file(unfinished), "wb", buffering=0)
        self._write(self._whole or _line(self._first))
        self._whole = b""
        rename(unfinished, self._path)

    def record_solved(self, solved: dict[str, tuple[Solution, dict[str, dict[str, str]]]]) -> None:
        """Keep the coefficients of all groups of a batch, and the digests of what they were computed from."""
        self.solved |= solved
        spheres = [
            {
                "group": group,
                "coefficients": _encode(solution.coefficients),
                "geometry": vars(solution.geometry),
                "inputs": inputs,
            }
            for group, (solution, inputs) in solved.items()
        ]
        self._append({"kind": "solved", "spheres": spheres})

    def record_written(self, tensor: str, output: str, inputs: dict[str, str] | None = None) -> None:
        """Keep the digest of a tensor that is wholly in its file (and, for a copy, of what it was copied from)."""
        self._append({"kind": "written", "tensor": tensor, "output": output, "inputs": inputs})

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a line that did not arrive fails its digest
            self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        line = _line(record)
        with self._lock:
            self._write(line)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise MergeError(
                f"{self._path} could not be written: {error.strerror}. What was written so far is kept; see to the "
                "disk and resume."
            ) from error

    def _load(self, path: Path, header: dict[str, Any], marks: dict[str, Any]) -> bytes:
        """Read all lines up to the first that is not as it was written; return them."""
        with disk_errors(path, "read"):
            lines = path.read_bytes().splitlines(keepends=True)
        for number, raw in enumerate(lines):
            line = _record(raw)
            if line is None:
                if raw is not lines[-1]:
                    logger.warning(
                        "Line %d of %s is damaged: what it and later ones recorded is computed again.",
                        number + 1,
                        path,
                    )
                return b"".join(lines[:number])
            if number == 0:
                _check_header(line, header, path)
                _warn_of_rewritten(line["marks"], marks)
            elif line["kind"] == "solved":
                self.solved |= {sphere["group"]: _decode_sphere(sphere) for sphere in line["spheres"]}
            else:
                self.written[line["tensor"]] = line
        return b"".join(lines)


def _line(record: dict[str, Any]) -> bytes:
    return _signed(json.dumps(record).encode())


def _signed(text: bytes) -> bytes:
    return b'[%b, "%b"]\n' % (text, xxh3_128_hexdigest(text).encode())


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None if it is torn or altered."""
    text = line[1:-_AFTER_RECORD]
    if line != _signed(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def _check_header(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    expected = json.loads(json.dumps(expected))
    changed = [key for key in expected if found.get(key) != expected[key]]
    if changed:
        details = "; ".join(f"{key} was {found.get(key)!r} and is now {expected[key]!r}" for key in changed)
        raise ResumeError(
            f"The interrupted merge in {path.parent.parent} was started differently: {details}. Start it the same "
            "way, or pass --overwrite to start anew."
        )


def _warn_of_rewritten(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """What was read so far is digested again; of the rest only the time of its file is known."""
    for spec, mark in json.loads(json.dumps(expected)).items():
        if found.get(spec) != mark:
            logger.warning(
                "A weight file of %r was rewritten since the merge was interrupted. Tensors merged before are "
                "compared with their digests; others are taken as they are now.",
                spec,
            )


def _decode_sphere(sphere: dict[str, Any]) -> tuple[Solution, dict[str, dict[str, str]]]:
    lists = {name: tuple(value) for name, value in sphere["geometry"].items() if isinstance(value, list)}
    geometry = Geometry(**{**sphere["geometry"], **lists})
    return Solution(_decode(sphere["coefficients"]), geometry), sphere["inputs"]


def _encode(array: NDArray[np.float64]) -> dict[str, Any]:
    return {"shape": array.shape, "float64": base64.b64encode(array.tobytes()).decode()}


def _decode(stored: dict[str, Any]) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(stored["float64"]), dtype=np.float64).reshape(stored["shape"])
