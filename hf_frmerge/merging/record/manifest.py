"""The record of a merge as types, and how it is read: what went in, what was done, what came out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.resolve import split_pair
from hf_frmerge.checkpoints.tensors.small_files import read_file
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.planning.corrections import CalibrationRecord
from hf_frmerge.merging.planning.vocabulary.record import VocabularyRecord
from hf_frmerge.merging.record.check_types import check_types
from hf_frmerge.merging.record.manifest_entries import Machine, RecordedFile, RecordedModel, RecordedTensor, files_of
from hf_frmerge.merging.record.summary import MergeReport

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST_FILE = "merge_manifest.json"
LOCAL_SOURCES_FILE = ".frmerge_sources.json"
"""Where the models lie on this machine. Kept beside the manifest, and never pushed."""

EVALUATION_FILE = "merge_evaluation.json"
REPORT_FILE = "merge_report.html"
STALE_FILES = (MANIFEST_FILE, EVALUATION_FILE, REPORT_FILE)
"""What tells of a merge and would be untrue of the next one in its folder."""

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
"""Records of version 2 know coefficients only, and do not say so. They are read as if they did."""

SCHEMA_FILE = "merge_manifest.schema.json"
"""JSON schema of the manifest, beside this module."""


@dataclass(frozen=True)
class Manifest:
    """
    The record of one merge, enough to make it again and to check it.

    Attributes:
        hf_frmerge: version that merged.
        arguments: all of `MergingArguments` but `output_dir`, as JSON values; tokens are masked.
        finished_at: ISO 8601, UTC.
        report: totals; its notes name local models by their folders, and it does not say where the output was.
        versions: of Python and of libraries.
        files: of the output, but for the model card, the evaluation and this record.
        calibration: how the merge was fitted to its experts on prompts; `None` for a merge without data.
        vocabulary: how rows were matched by token; `None` if all models have the same tokens.
    """

    hf_frmerge: str
    output_kind: Literal["full", "adapter"]
    method: str
    space: str
    arguments: dict[str, Any]
    experts: tuple[RecordedModel, ...]
    base_model: RecordedModel | None
    finished_at: str
    n_processes: int
    machine: Machine
    report: MergeReport
    versions: dict[str, str]
    files: dict[str, RecordedFile]
    tensors: dict[str, RecordedTensor]
    calibration: CalibrationRecord | None = None
    vocabulary: VocabularyRecord | None = None

    @property
    def models(self) -> tuple[RecordedModel, ...]:
        """The experts, then the base model if there is one."""
        return self.experts if self.base_model is None else (*self.experts, self.base_model)

    @property
    def is_weighted(self) -> bool:
        """Whether weights decided anything: a table of coefficients takes their place."""
        return self.arguments.get("coefficients") is None

    @property
    def weights(self) -> list[float]:
        """Weights of the experts."""
        return [expert.weight for expert in self.experts if expert.weight is not None]

    @property
    def all_versions(self) -> dict[str, str]:
        """Versions of hf_frmerge, Python and the libraries."""
        return {"hf_frmerge": self.hf_frmerge, **self.versions}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """Read it from JSON values; what this version does not know is passed over."""
        base, calibration = values["base_model"], values.get("calibration")
        vocabulary = values.get("vocabulary")
        return cls(
            hf_frmerge=values["hf_frmerge"],
            output_kind=values["output_kind"],
            method=values["method"],
            space=values["space"],
            arguments=values["arguments"],
            experts=tuple(RecordedModel.from_dict(entry) for entry in values["experts"]),
            base_model=RecordedModel.from_dict(base) if base is not None else None,
            finished_at=values["finished_at"],
            n_processes=values["n_processes"],
            machine=Machine(values["machine"]["architecture"], values["machine"]["system"]),
            report=MergeReport.from_dict({**values["report"], "notes": values["notes"]}),
            versions=values["versions"],
            files=files_of(values["files"]),
            tensors={name: RecordedTensor.from_dict(entry) for name, entry in values["tensors"].items()},
            calibration=CalibrationRecord.from_dict(calibration) if calibration is not None else None,
            vocabulary=VocabularyRecord.from_dict(vocabulary) if vocabulary is not None else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        base = self.base_model
        return {
            "format_version": FORMAT_VERSION,
            "hf_frmerge": self.hf_frmerge,
            "output_kind": self.output_kind,
            "method": self.method,
            "space": self.space,
            "arguments": self.arguments,
            "experts": [model.to_dict() for model in self.experts],
            "base_model": base.to_dict() if base is not None else None,
            "finished_at": self.finished_at,
            "n_processes": self.n_processes,
            "machine": vars(self.machine),
            "report": {n: value for n, value in self.report.to_dict().items() if n not in ("output_dir", "notes")},
            "versions": self.versions,
            **({"calibration": self.calibration.to_dict()} if self.calibration is not None else {}),
            **({"vocabulary": self.vocabulary.to_dict()} if self.vocabulary is not None else {}),
            "notes": self.report.notes,
            "files": {name: file.to_dict() for name, file in self.files.items()},
            "tensors": {name: tensor.to_dict() for name, tensor in self.tensors.items()},
        }


@dataclass(frozen=True)
class LocalSources:
    """Contents of `LOCAL_SOURCES_FILE`: path and marks of every recorded model, the base last."""

    models: tuple[str | None, ...]
    marks: tuple[dict[str, str], ...]


def local_sources(output_dir: Path, manifest: Manifest) -> tuple[list[str | None], list[dict[str, str]]]:
    """Where the recorded models lie on this machine (`None` if that is not known here), and marks of their files."""
    file = output_dir / LOCAL_SOURCES_FILE
    if not file.exists():
        n_models = len(manifest.models)
        return [None] * n_models, [{} for _ in range(n_models)]
    try:
        known = parse_json(read_file(LocalFolder(str(output_dir)), LOCAL_SOURCES_FILE, str(output_dir)))
        sources = LocalSources(tuple(known["models"]), tuple(known["marks"]))
        check_types(sources)
        if not len(sources.models) == len(sources.marks) == len(manifest.models):
            raise ValueError(f"it is about {len(sources.models)} models, the merge had {len(manifest.models)}")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not what a merge writes ({type(error).__name__}: {error}). Remove it, and say where the "
            "models are with --experts and --base-model."
        ) from error
    return list(sources.models), list(sources.marks)


def parts_of_path(path: str | None) -> tuple[str | None, str | None]:
    """Return where a recorded model is, and where the adapter on it is if it has one."""
    return (split_pair(path) if path is not None else None) or (path, None)


def read_manifest(output_dir: Path | str) -> Manifest:
    """
    Read `merge_manifest.json` from a folder, local or behind a URL (`hub://org/name@commit`: only this file).

    Raises:
        CheckpointError: If there is none, it is of another format, or it is not as a merge writes it.
    """
    values = read_values(output_dir)
    try:
        manifest = Manifest.from_dict(values)
        check_types(manifest)
        _check_sense(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # something is missing, or not of its type
        raise CheckpointError(
            f"{output_dir}/{MANIFEST_FILE} is not what a merge writes ({type(error).__name__}: {error}). Restore the "
            "file, or merge again."
        ) from error
    return manifest


def _check_sense(manifest: Manifest) -> None:
    """Raise `ValueError` if the parts of a record do not fit together, or it names files outside of their folders."""
    n_experts = len(manifest.experts)
    if n_experts == 0 or len(manifest.weights) not in (0, n_experts):
        raise ValueError(f"{n_experts} experts with {len(manifest.weights)} weights")
    for option in ("block", "norm"):
        if not isinstance(manifest.arguments[option], str):
            raise ValueError(f"the argument {option} is {manifest.arguments[option]!r}")
    for name in [*manifest.files, *(name for model in manifest.models for name in model.files)]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name or not path.parts:
            raise ValueError(f"{name!r} is not the name of a file in its folder")
    for name, tensor in manifest.tensors.items():
        geometry = tensor.geometry
        pairs = n_experts * (n_experts - 1) // 2
        if geometry and (len(geometry.norms) != n_experts or len(geometry.pair_angles) not in (0, pairs)):
            raise ValueError(f"the geometry of {name!r} is not of {n_experts} experts")


def read_values(output_dir: Path | str) -> dict[str, Any]:
    """Read the JSON values of a manifest, those that this version does not know as well, to write them again."""
    folder, path = open_folder(str(output_dir)), f"{output_dir}/{MANIFEST_FILE}"
    if not folder.exists(MANIFEST_FILE):
        raise CheckpointError(
            f"{output_dir} has no {MANIFEST_FILE}. Expected a folder that `frmerge merge` wrote, complete."
        )
    try:
        values: dict[str, Any] = parse_json(read_file(folder, MANIFEST_FILE, str(output_dir)), finite=True)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Merge again.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{path} has format {version!r}, this version reads {' and '.join(map(str, READABLE_VERSIONS))}. Update "
            "hf_frmerge."
        )
    return values
