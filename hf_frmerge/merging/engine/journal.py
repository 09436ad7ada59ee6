"""Journal of finished work, one JSON line for each entry, with which an interrupted merge is resumed."""

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
from hf_frmerge.merging.planning.vocabulary.choose_tokens import row_maps_digest

if TYPE_CHECKING:
    from hf_frmerge.merging.engine.outcomes import FactorDetails
    from hf_frmerge.merging.planning.plan import MergePlan

logger = logging.getLogger(__name__)

_FORMAT = 3  # version of the entries; a merge can only be resumed with the same one
_AFTER_RECORD = len(', ""]\n') + 32  # bytes of a line after its entry: a digest of 32 hexadecimal digits


def fingerprint(plan: MergePlan, kernels: str) -> dict[str, Any]:
    """Return everything that the output depends on and that is known without reading weights, by name."""
    options = plan.args.to_dict()
    parts: dict[str, Any] = {f"option {name}": options[name] for name in RESULT_OPTIONS}
    parts["journal"] = _FORMAT
    parts["weights"] = plan.weights
    parts["compute kernels"] = kernels
    if plan.coefficients is not None:
        parts["coefficients"] = plan.coefficients.digest
    if plan.vocabulary is not None:
        parts["rows of tokens"] = row_maps_digest(plan.models)
    if plan.calibration is not None:
        found = plan.corrections or plan.fitted
        parts["calibration"] = found.digest if found is not None else None
    models = [(f"expert {index + 1}", expert) for index, expert in enumerate(plan.experts)]
    for role, model in [*models, *([("base model", plan.base)] if plan.base else [])]:
        files = {name: size for opened in model.opened for name, size in opened.files.items()}
        parts[role] = {"spec": model.spec, "files": files}
    return parts


def modification_marks(plan: MergePlan) -> dict[str, Any]:
    """Return by model a cheap mark of every weight file, which changes when the file is rewritten."""
    return {model.spec: [mark for opened in model.opened for mark in opened.fingerprint()] for model in plan.models}


class Journal:
    """
    Append-only journal of a merge.

    A line is a JSON array of an entry and its XXH3-128 digest. Reading stops at the first line that is truncated or
    altered, as a kill may leave it; later entries are computed again. The journal is never trusted alone: finished
    bytes are digested again before they are kept.
    """

    def __init__(
        self, folder: Path, rank: int, header: dict[str, Any], marks: dict[str, Any], *, resume: bool
    ) -> None:
        """
        Load the journals of an earlier run if `resume`; nothing is written before `start`.

        Args:
            folder: Staging folder of the output.
            rank: Number of the process; each process writes its own file.
            header: `fingerprint` of the merge.
            marks: `modification_marks` of its inputs.
            resume: Whether to load existing journals: those of all processes, as the earlier run may have had more.

        Raises:
            ResumeError: If the earlier merge was started with other options or inputs; the message lists them.
        """
        self.decided: dict[str, Decided] = {}
        self.written: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._path = folder / f"journal-{rank}.jsonl"
        self._first = {"kind": "merge", "marks": marks, **header}
        loaded = {path: self._load(path, header, marks) for path in sorted(folder.glob("journal-*.jsonl")) if resume}
        self._whole = loaded.get(self._path, b"")

    def start(self) -> None:
        """Rewrite this process's file with its intact lines; all processes must have read it before."""
        # Written to a new file and renamed, so that a kill in between does not lose the intact lines. Unbuffered, so
        # that an entry reaches the system before its tensor counts as done.
        unfinished = self._path.with_name(f"{self._path.name}.partial")
        with disk_errors(self._path, "created"):
            self._file = os.fdopen(create_file(unfinished), "wb", buffering=0)
        self._write(self._whole or signed_line(self._first))
        self._whole = b""
        rename(unfinished, self._path)

    def record_decided(self, decided: dict[str, Decided]) -> None:
        """Record the decisions for all groups of a batch, with the digests of the inputs they were computed from."""
        self.decided |= decided
        groups = {group: {**entry.decision.to_journal(), "inputs": entry.inputs} for group, entry in decided.items()}
        self._append({"kind": "decided", "groups": groups})

    def record_written(
        self,
        tensor: str,
        output: str,
        inputs: dict[str, str] | None,
        details: FactorDetails | None,
        n_saturated: int,
    ) -> None:
        """
        Record a tensor that is completely in its file.

        Args:
            tensor: Its name.
            output: Digest of what was written.
            inputs: Digests of what it was made from, where no decision holds them: of a copy, say.
            details: How its factors were written, of a module of an adapter.
            n_saturated: How many values became the largest number of its dtype.
        """
        record: dict[str, Any] = {"kind": "written", "tensor": tensor, "output": output, "inputs": inputs}
        if n_saturated:
            record["saturated"] = n_saturated
        self._append({**record, "details": vars(details) if details is not None else None})

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a line that did not reach the disk fails its digest when it is read
            self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        line = signed_line(record)
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
        """Read a journal up to the first damaged line; return the intact lines."""
        with disk_errors(path, "read"):
            lines = path.read_bytes().splitlines(keepends=True)
        for number, raw in enumerate(lines):
            line = read_signed_line(raw)
            if line is None:
                if raw is not lines[-1]:
                    logger.warning(
                        "Line %d of %s is damaged: what it and later ones recorded is computed again.",
                        number + 1,
                        path,
                    )
                return b"".join(lines[:number])
            try:
                self._take(line, header, marks, path, is_first=number == 0)
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # signed, but by something else
                raise ResumeError(
                    f"Line {number + 1} of {path} is not what a merge writes ({type(error).__name__}: {error}). Pass "
                    "--overwrite to start anew."
                ) from error
        return b"".join(lines)

    def _take(
        self, line: dict[str, Any], header: dict[str, Any], marks: dict[str, Any], path: Path, *, is_first: bool
    ) -> None:
        """Take over what an intact line records."""
        if is_first:
            _check_header(line, header, path)
            _warn_of_rewritten(line["marks"], marks)
        elif line["kind"] == "decided":
            self.decided |= {
                group: Decided(from_journal(entry), entry["inputs"]) for group, entry in line["groups"].items()
            }
        else:
            self.written[line["tensor"]] = line


class NoJournal:
    """Journal of a merge in memory, which cannot be resumed."""

    def __init__(self) -> None:
        self.decided: dict[str, Decided] = {}
        self.written: dict[str, dict[str, Any]] = {}

    def record_decided(self, decided: dict[str, Decided]) -> None:
        """Do nothing."""

    def record_written(
        self,
        tensor: str,
        output: str,
        inputs: dict[str, str] | None,
        details: FactorDetails | None,
        n_saturated: int,
    ) -> None:
        """Do nothing."""


def signed_line(record: dict[str, Any]) -> bytes:
    """Return an entry and its XXH3-128 digest as a line of JSON."""
    return _signed(json.dumps(record).encode())


def _signed(text: bytes) -> bytes:
    return b'[%b, "%b"]\n' % (text, xxh3_128_hexdigest(text).encode())


def read_signed_line(line: bytes) -> Any:
    """Return the entry of a line; None if the line is truncated or altered."""
    text = line[1:-_AFTER_RECORD]
    if line != _signed(text):
        return None
    try:
        return json.loads(text)
    except (RecursionError, ValueError):  # signed, but by something else
        return None


# What was decided while ambiguous blocks raised had none of them, so it is the same with "linear".
_HARMLESS = (("option on_ambiguous", "raise", "linear"),)


def _check_header(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    now = json.loads(json.dumps(now))  # as it would be read back: tuples become lists
    changed = [key for key in now if before.get(key) != now[key] and (key, before.get(key), now[key]) not in _HARMLESS]
    if changed:
        details = "; ".join(f"{key} was {before.get(key)!r} and is now {now[key]!r}" for key in changed)
        raise ResumeError(
            f"The interrupted merge in {path.parent.parent} was started differently: {details}. Start it the same "
            "way, or pass --overwrite to start anew."
        )


def _warn_of_rewritten(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn if a weight file was rewritten: tensors that were not read before have no digest to compare with."""
    for spec, mark in json.loads(json.dumps(now)).items():
        if before.get(spec) != mark:
            logger.warning(
                "A weight file of %r was rewritten since the merge was interrupted. Tensors merged before are "
                "compared with their digests; others are taken as they are now.",
                spec,
            )
