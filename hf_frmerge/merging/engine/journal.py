"""What a merge has finished so far, one JSON line each, so that a killed one goes on where it stopped."""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.disk import create_file, disk_errors, rename
from hf_frmerge.errors import MergeError, ResumeError
from hf_frmerge.merging.arguments.result_options import RESULT_OPTIONS
from hf_frmerge.merging.decisions import Decided, from_journal

if TYPE_CHECKING:
    from hf_frmerge.merging.engine.outcomes import FactorDetails
    from hf_frmerge.merging.planning.plan import MergePlan

logger = logging.getLogger(__name__)

_FORMAT = 2  # of the records; other versions cannot go on with each other's merges
_AFTER_RECORD = len(', ""]\n') + 32  # bytes of a line after its record: a digest of 32 hexadecimal digits


def fingerprint(plan: MergePlan, kernels: str) -> dict[str, Any]:
    """Return everything the output depends on and that can be told without reading weights, part by part."""
    options = plan.args.to_dict()
    parts: dict[str, Any] = {f"option {name}": options[name] for name in RESULT_OPTIONS}
    parts["journal"] = _FORMAT
    parts["weights"] = plan.weights
    parts["compute kernels"] = kernels
    if plan.coefficients is not None:
        parts["coefficients"] = plan.coefficients.digest
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
        self.decided: dict[str, Decided] = {}
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

    def record_decided(self, decided: dict[str, Decided]) -> None:
        """Keep the decisions for all groups of a batch, and the digests of what they were taken from."""
        self.decided |= decided
        groups = {group: {**found.decision.to_journal(), "inputs": found.inputs} for group, found in decided.items()}
        self._append({"kind": "decided", "groups": groups})

    def record_written(
        self, tensor: str, output: str, inputs: dict[str, str] | None, details: FactorDetails | None
    ) -> None:
        """
        Keep the digest of a tensor that is wholly in its file.

        Args:
            tensor: Its name.
            output: Digest of what was written.
            inputs: Digests of what it was made from, where no decision holds them: of a copy, say.
            details: How its factors were written, of a module of an adapter.
        """
        record = {"kind": "written", "tensor": tensor, "output": output, "inputs": inputs}
        self._append({**record, "details": vars(details) if details is not None else None})

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
            elif line["kind"] == "decided":
                self.decided |= {
                    group: Decided(from_journal(found), found["inputs"]) for group, found in line["groups"].items()
                }
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
