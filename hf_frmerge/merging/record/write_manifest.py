"""The record of a merge, written: manifest, and checksums that follow later."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_hexdigest

from hf_frmerge import __version__
from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.kernels.elementwise import Elementwise
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.record import checksums
from hf_frmerge.merging.record.checksums import file_entry, input_files, is_unchanged, modification_marks, sha256_of
from hf_frmerge.merging.record.manifest import (
    LOCAL_SOURCES_FILE,
    MANIFEST_FILE,
    Manifest,
    local_sources,
    parts_of_path,
    read_manifest,
    read_values,
)
from hf_frmerge.merging.record.manifest_entries import (
    Machine,
    RecordedFile,
    RecordedFolder,
    RecordedModel,
    RecordedTensor,
)
from hf_frmerge.methods.spectral.decision import Spectral

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hf_frmerge.checkpoints.source import Source
    from hf_frmerge.checkpoints.tensors.layout import Shard
    from hf_frmerge.merging.engine.outcomes import StepOutcome
    from hf_frmerge.merging.planning.coefficient_table import CoefficientTable
    from hf_frmerge.merging.planning.plan import Expert, MergePlan
    from hf_frmerge.merging.planning.vocabulary.record import VocabularyRecord
    from hf_frmerge.merging.record.summary import MergeReport

_PACKAGES = ("numpy", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")


def write_manifest(
    output_dir: Path,
    plan: MergePlan,
    outcomes: Sequence[StepOutcome],
    *,
    report: MergeReport,
    n_processes: int,
    small_files: dict[str, Path],
) -> Manifest:
    """
    Write `merge_manifest.json`; return what `read_manifest` would read there.

    Args:
        report: Totals of the merge.
        small_files: Name of every file but the shards of a full model -> where it lies now.
    """
    arguments = json.loads(json.dumps(plan.args.to_dict()))  # as they are read: with lists in the place of tuples
    arguments.pop("output_dir")
    if plan.coefficients is not None:
        arguments["coefficients"] = COEFFICIENTS_FILE  # the table that was given is in the record itself
    shards = plan.layout.shards if plan.layout else ()
    manifest = Manifest(
        hf_frmerge=__version__,
        output_kind=plan.output_kind,
        method=plan.args.method,
        space=plan.space,
        arguments=arguments,
        experts=tuple(_model(expert, plan, weight) for expert, weight in zip(plan.experts, plan.weights)),
        base_model=_model(plan.base, plan, None) if plan.base else None,
        finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        n_processes=n_processes,
        machine=Machine(platform.machine(), platform.system()),
        report=replace(
            report, output_dir=None, notes=tuple(_without_paths(note, plan.models) for note in report.notes)
        ),
        versions=package_versions(),
        files={
            **{shard.file: _shard_entry(output_dir / shard.file, shard) for shard in shards},
            **{name: file_entry(path) for name, path in small_files.items()},
        },
        tensors={outcome.step.name: _tensor(outcome, plan.fitted) for outcome in outcomes},
        calibration=plan.calibration,
        vocabulary=_vocabulary(plan),
    )
    write_file(output_dir / MANIFEST_FILE, _as_text(manifest.to_dict()))
    paths = [[_path(part) for part in model.source.parts] for model in plan.models]
    marks = [
        dict(mark for part, path in zip(model.parts, own) for mark in modification_marks(path, part.files).items())
        for own, model in zip(paths, manifest.models)
    ]
    known = {"models": list(map("+".join, paths)), "marks": marks}
    write_file(output_dir / LOCAL_SOURCES_FILE, json.dumps(known) + "\n")
    return manifest


def record_checksums(output_dir: Path, known: Mapping[str, str] | None = None) -> list[str]:
    """
    Fill in the SHA-256 that the manifest of a finished merge lacks.

    Args:
        output_dir: Folder of the merge.
        known: SHA-256 of its files that somebody computed already, such as the client that uploads them.

    Returns:
        Inputs that stay without one, as `model: file`: they are not on this machine, or were rewritten since.
    """
    manifest = read_manifest(output_dir)
    values = read_values(output_dir)  # to be changed and written: what only another version knows stays as it is
    for name, entry in values["files"].items():
        if entry["sha256"] is None:
            entry["sha256"] = (known or {}).get(name) or sha256_of(output_dir / name)
    missing = []
    paths, marks = local_sources(output_dir, manifest)
    models = [*values["experts"], *([values["base_model"]] if values["base_model"] else [])]
    parts = [
        (part, place, unchanged)
        for model, path, unchanged in zip(models, paths, marks)
        for part, place in zip([model, *([model["adapter"]] if "adapter" in model else [])], parts_of_path(path))
    ]
    for model, path, unchanged in parts:
        for name, entry in model["files"].items():
            if entry["sha256"] is None and path is not None and is_unchanged(path, name, unchanged):
                entry["sha256"] = sha256_of(Path(path) / name)
            if entry["sha256"] is None:
                missing.append(f"{model['id']}: {name}")
    if Manifest.from_dict(values) != manifest:
        write_file(output_dir / MANIFEST_FILE, _as_text(values))
    return missing


def package_versions() -> dict[str, str]:
    """Versions of Python and of the libraries a merge may involve, without importing them."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = _version(package)
        except PackageNotFoundError:
            continue
    return versions


def _version(package: str) -> str:
    # `importlib.metadata.version` parses the README in the metadata, too: 3.5 ms for these packages instead of 0.5.
    installed = distribution(package)
    header = re.search(r"^Version: (.+)$", installed.read_text("METADATA") or "", re.MULTILINE)
    return header[1] if header else installed.version


def _as_text(values: dict[str, Any]) -> str:
    """Give every tensor a line. To indent all that is in them takes ten times as long, and nobody reads it so."""
    before, key, after = json.dumps({**values, "tensors": {}}, indent=1).rpartition('"tensors": {}')
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in values["tensors"].items()]
    return "".join([before, key[:-1], "\n  ", ",\n  ".join(lines), "\n }", after, "\n"])


def _shard_entry(path: Path, shard: Shard) -> RecordedFile:
    sha256 = sha256_of(path) if shard.size <= checksums.SMALL_FILE else None
    return RecordedFile(shard.size, sha256, xxh3_128_hexdigest(shard.header))


def _vocabulary(plan: MergePlan) -> VocabularyRecord | None:
    """Return what was made of the vocabularies, with the names that models have in a record."""
    if plan.vocabulary is None:
        return None
    names = {model.spec: _id(model) for model in plan.models}
    models = tuple(replace(model, spec=names[model.spec]) for model in plan.vocabulary.models)
    return replace(plan.vocabulary, models=models)


def _id(model: Expert) -> str:
    """Name a model: local folders are known by their name only, as the manifest is pushed."""
    return "+".join(map(_id_of, model.source.parts))


def _id_of(source: Source) -> str:
    return source.repo_id or Path(source.path).name


def _path(source: Source) -> str:
    if "://" in source.path:
        return source.path
    path = Path(source.path)
    # A file is known by its name, which what it links to may lack.
    return str(path.parent.resolve() / path.name if source.is_gguf else path.resolve())


def _model(expert: Expert, plan: MergePlan, weight: float | None) -> RecordedModel:
    """Identity of a model."""
    model, *on_it = [
        RecordedFolder(
            id=_id_of(source),
            on_hub=source.repo_id is not None,
            revision=source.revision,
            commit=source.commit,
            kind=source.kind,
            files=input_files(source, weights, (*plan.carried, *plan.read_beside)),
        )
        for source, weights in expert.recorded
    ]
    return RecordedModel(**vars(model), weight=weight, adapter=on_it[0] if on_it else None)


def _without_paths(note: str, models: Sequence[Expert]) -> str:
    """Call local models by the names of their folders."""
    local = [model for model in models if any(part.repo_id is None for part in model.source.parts)]
    for model in sorted(local, key=lambda model: len(model.spec), reverse=True):
        if "/" in model.spec or "\\" in model.spec:  # a bare name hides nothing, and may be an ordinary word
            note = note.replace(model.spec, _id(model))
    return note


def _tensor(outcome: StepOutcome, fitted: CoefficientTable | None) -> RecordedTensor:
    step, details = outcome.step, outcome.details
    is_merged = outcome.decision is not None
    return RecordedTensor(
        outcome.action,
        step.dtype,
        step.shape,
        outcome.inputs,
        outcome.output,
        donor=None if is_merged else step.donor,
        n_blocks=step.n_blocks if is_merged else 0,
        decision=outcome.decision if isinstance(outcome.decision, (Elementwise, Spectral)) else None,
        rank=details.rank if details else None,
        norm=details.norm if details else None,
        truncation_error=details.truncation_error if details else None,
        geometry=outcome.geometry,
        n_saturated=outcome.n_saturated,
        is_fitted=is_merged and fitted is not None and step.name in fitted.rows,
    )
