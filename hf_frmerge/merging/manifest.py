"""The record of a merge: what went in, what was done, what came out."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from hf_frmerge import __version__
from hf_frmerge.checkpoints.writer import write_file
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from hf_frmerge.merging.outcomes import StepOutcome
    from hf_frmerge.merging.plan import Expert, MergePlan

MANIFEST_FILE = "merge_manifest.json"
COEFFICIENTS_FILE = "merge_coefficients.safetensors"
LOCAL_SOURCES_FILE = ".frmerge_sources.json"
"""Where the models lie on this machine. Kept beside the manifest, and never pushed."""

FORMAT_VERSION = 1
_PACKAGES = ("numpy", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")


def write_coefficients(output_dir: Path, outcomes: Sequence[StepOutcome]) -> None:
    """
    Write the coefficient table: tensor -> float64 `(blocks, experts)`, on the points of the merge.

    With it and the experts, the merged model can be derived again bit for bit. Copied tensors are not in it.
    """
    from safetensors.numpy import save

    table = {o.step.name: o.solution.coefficients for o in outcomes if o.solution is not None}
    write_file(output_dir / COEFFICIENTS_FILE, save(table, metadata={"format": "np"}))


def read_coefficients(output_dir: Path) -> dict[str, NDArray[np.float64]]:
    """Read the coefficient table."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = output_dir / COEFFICIENTS_FILE
    if not path.exists():
        raise CheckpointError(
            f"{output_dir} has no {COEFFICIENTS_FILE}: it was not written by hf_frmerge, or is torn."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Merge again.") from error


def write_manifest(
    output_dir: Path,
    plan: MergePlan,
    outcomes: Sequence[StepOutcome],
    *,
    report: dict[str, Any],
    n_processes: int,
    small_files: dict[str, Path],
    details: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """
    Write `merge_manifest.json`.

    Args:
        report: Totals of the merge.
        small_files: Name of every file but the shards of a full model -> where it lies now.
        details: What else is to be recorded of a tensor, by its name.
    """
    arguments = plan.args.to_dict()
    arguments.pop("output_dir")
    manifest = {
        "format_version": FORMAT_VERSION,
        "hf_frmerge": __version__,
        "output_kind": plan.output_kind,
        "method": plan.args.method,
        "space": plan.space,
        "arguments": arguments,
        "experts": [{**_source(e), "weight": w} for e, w in zip(plan.experts, plan.weights)],
        "base_model": _source(plan.base) if plan.base else None,
        "n_processes": n_processes,
        "report": {name: value for name, value in report.items() if name not in ("output_dir", "notes")},
        "versions": package_versions(),
        "notes": [_without_paths(note, plan.models) for note in plan.notes],
        "files": {
            **{
                shard.file: {"size": shard.size, "header_xxh3_128": xxh3_128_hexdigest(shard.header)}
                for shard in (plan.layout.shards if plan.layout else ())
            },
            **{name: file_entry(path) for name, path in small_files.items()},
        },
        "tensors": {o.step.name: _tensor(o) | (details or {}).get(o.step.name, {}) for o in outcomes},
    }
    write_file(output_dir / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")
    paths = [m.source.path if "://" in m.source.path else str(Path(m.source.path).resolve()) for m in plan.models]
    write_file(output_dir / LOCAL_SOURCES_FILE, json.dumps({"models": paths}) + "\n")


def read_manifest(output_dir: Path) -> dict[str, Any]:
    """
    Read `merge_manifest.json`.

    Raises:
        CheckpointError: If there is none, or it is of a later format.
    """
    path = output_dir / MANIFEST_FILE
    if not path.exists():
        raise CheckpointError(
            f"{output_dir} has no {MANIFEST_FILE}. Expected a folder that `frmerge merge` wrote, complete."
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Merge again.") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {manifest.get('format_version')!r}, this version reads {FORMAT_VERSION}. Update "
            "hf_frmerge."
        )
    return manifest


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a small file."""
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the libraries a merge may involve, without importing them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _source(expert: Expert) -> dict[str, Any]:
    """Identity of a model. Local folders are known by their name only: the manifest is pushed."""
    source = expert.source
    return {
        "id": source.repo_id or Path(source.path).name,
        "on_hub": source.repo_id is not None,
        "revision": source.revision,
        "commit": source.commit,
        "kind": source.kind,
        "files": expert.weights.files,
    }


def _without_paths(note: str, models: Sequence[Expert]) -> str:
    """Call local models by the names of their folders."""
    local = [model.source for model in models if model.source.repo_id is None]
    for source in sorted(local, key=lambda source: len(source.spec), reverse=True):
        if "/" in source.spec or "\\" in source.spec:  # a bare name hides nothing, and may be an ordinary word
            note = note.replace(source.spec, Path(source.path).name)
    return note


def _tensor(outcome: StepOutcome) -> dict[str, Any]:
    step = outcome.step
    entry: dict[str, Any] = {
        "action": outcome.action,
        "dtype": step.dtype,
        "shape": step.shape,
        "inputs_xxh3_128": outcome.inputs,
        "output_xxh3_128": outcome.output,
    }
    if outcome.solution is None:
        return {**entry, "donor": step.donor}
    return {**entry, "n_blocks": step.n_blocks, "geometry": asdict(outcome.solution.geometry)}
