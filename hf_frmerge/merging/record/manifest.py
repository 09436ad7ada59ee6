"""The record of a merge: what went in, what was done, what came out."""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from hf_frmerge import __version__
from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.engine.decisions import Solution, Trimming, trimming_of
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.record import checksums
from hf_frmerge.merging.record.checksums import file_entry, input_files, is_unchanged, modification_marks, sha256_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.tensors.layout import Shard
    from hf_frmerge.merging.engine.decisions import Decision
    from hf_frmerge.merging.engine.outcomes import StepOutcome
    from hf_frmerge.merging.planning.plan import Expert, MergePlan

MANIFEST_FILE = "merge_manifest.json"
LOCAL_SOURCES_FILE = ".frmerge_sources.json"
"""Where the models lie on this machine. Kept beside the manifest, and never pushed."""

EVALUATION_FILE = "merge_evaluation.json"
REPORT_FILE = "merge_report.html"
STALE_FILES = (MANIFEST_FILE, EVALUATION_FILE, REPORT_FILE)
"""What tells of a merge and would be untrue of the next one in its folder."""

FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)
"""Records of version 2 know coefficients only, and do not say so."""

SCHEMA_FILE = "merge_manifest.schema.json"
"""JSON schema of the manifest, beside this module."""

_PACKAGES = ("numpy", "torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")


def write_coefficients(output_dir: Path, outcomes: Sequence[StepOutcome], space: str) -> bool:
    """
    Write the coefficient table: tensor -> float64 `(blocks, experts)`, on the points of the merge.

    With it and the experts, the merged model can be derived again bit for bit. Copied tensors are not in it. Returns
    whether there is one: not all methods give a sum of the experts.
    """
    from safetensors.numpy import save

    # One entry: safetensors writes several in any order, and the file is compared bit for bit.
    table = {o.step.name: o.solution.coefficients for o in outcomes if o.solution is not None}
    if not table:
        return False
    write_file(output_dir / COEFFICIENTS_FILE, save(table, metadata={"space": space}))
    return True


def write_manifest(
    output_dir: Path,
    plan: MergePlan,
    outcomes: Sequence[StepOutcome],
    *,
    report: dict[str, Any],
    n_processes: int,
    small_files: dict[str, Path],
) -> None:
    """
    Write `merge_manifest.json`.

    Args:
        report: Totals of the merge.
        small_files: Name of every file but the shards of a full model -> where it lies now.
    """
    arguments = plan.args.to_dict()
    arguments.pop("output_dir")
    if plan.coefficients is not None:
        arguments["coefficients"] = COEFFICIENTS_FILE  # the table that was given is in the record itself
    shards = plan.layout.shards if plan.layout else ()
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "hf_frmerge": __version__,
        "output_kind": plan.output_kind,
        "method": plan.args.method,
        "space": plan.space,
        "arguments": arguments,
        "experts": [{**_source(e, plan), "weight": w} for e, w in zip(plan.experts, plan.weights)],
        "base_model": _source(plan.base, plan) if plan.base else None,
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "n_processes": n_processes,
        "machine": {"architecture": platform.machine(), "system": platform.system()},
        "report": {name: value for name, value in report.items() if name not in ("output_dir", "notes")},
        "versions": package_versions(),
        "notes": [_without_paths(note, plan.models) for note in report["notes"]],
        "files": {
            **{shard.file: _shard_entry(output_dir / shard.file, shard) for shard in shards},
            **{name: file_entry(path) for name, path in small_files.items()},
        },
        "tensors": {o.step.name: _tensor(o) for o in outcomes},
    }
    write_file(output_dir / MANIFEST_FILE, _as_text(manifest))
    paths = [m.source.path if "://" in m.source.path else str(Path(m.source.path).resolve()) for m in plan.models]
    marks = [modification_marks(path, entry["files"]) for path, entry in zip(paths, recorded_models(manifest))]
    write_file(output_dir / LOCAL_SOURCES_FILE, json.dumps({"models": paths, "marks": marks}) + "\n")


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
    for name, entry in manifest["files"].items():
        if entry["sha256"] is None:
            entry["sha256"] = (known or {}).get(name) or sha256_of(output_dir / name)
    missing = []
    paths, marks = local_sources(output_dir, manifest)
    for model, path, unchanged in zip(recorded_models(manifest), paths, marks):
        for name, entry in model["files"].items():
            if entry["sha256"] is None and path is not None and is_unchanged(path, name, unchanged):
                entry["sha256"] = sha256_of(Path(path) / name)
            if entry["sha256"] is None:
                missing.append(f"{model['id']}: {name}")
    if manifest != read_manifest(output_dir):
        write_file(output_dir / MANIFEST_FILE, _as_text(manifest))
    return missing


def recorded_models(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of the experts, then that of the base model if there is one."""
    return [*manifest["experts"], *([manifest["base_model"]] if manifest["base_model"] else [])]


def local_sources(output_dir: Path, manifest: dict[str, Any]) -> tuple[list[str | None], list[dict[str, str]]]:
    """Where the recorded models lie on this machine (`None` if that is not known here), and marks of their files."""
    file = output_dir / LOCAL_SOURCES_FILE
    if not file.exists():
        n_models = len(recorded_models(manifest))
        return [None] * n_models, [{} for _ in range(n_models)]
    known = json.loads(file.read_text(encoding="utf-8"))
    return known["models"], known["marks"]


def read_manifest(output_dir: Path | str) -> dict[str, Any]:
    """
    Read `merge_manifest.json` from a folder, local or behind a URL (`hub://org/name@commit`: only this file).

    Raises:
        CheckpointError: If there is none, or it is of another format.
    """
    folder, path = open_folder(str(output_dir)), f"{output_dir}/{MANIFEST_FILE}"
    if not folder.exists(MANIFEST_FILE):
        raise CheckpointError(
            f"{output_dir} has no {MANIFEST_FILE}. Expected a folder that `frmerge merge` wrote, complete."
        )
    try:
        manifest: dict[str, Any] = json.loads(folder.read(MANIFEST_FILE))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Merge again.") from error
    if manifest.get("format_version") not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{path} has format {manifest.get('format_version')!r}, this version reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}. Update hf_frmerge."
        )
    return manifest


def recorded_decision(entry: dict[str, Any], coefficients: NDArray[np.float64] | None) -> Decision | None:
    """
    Return the decision a merged tensor came from, `None` if the record has none.

    Args:
        entry: Of the tensor, in the manifest.
        coefficients: Of the tensor, in the coefficient table.
    """
    recorded = entry.get("decision", {"kind": "coefficients"})  # version 2 knows no other
    if recorded["kind"] == "trimming":
        return trimming_of(recorded)
    return Solution(coefficients, None) if coefficients is not None else None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the libraries a merge may involve, without importing them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _as_text(manifest: dict[str, Any]) -> str:
    """Give every tensor a line. To indent all that is in them takes ten times as long, and nobody reads it so."""
    before, key, after = json.dumps({**manifest, "tensors": {}}, indent=1).rpartition('"tensors": {}')
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest["tensors"].items()]
    return "".join([before, key[:-1], "\n  ", ",\n  ".join(lines), "\n }", after, "\n"])


def _shard_entry(path: Path, shard: Shard) -> dict[str, Any]:
    sha256 = sha256_of(path) if shard.size <= checksums.SMALL_FILE else None
    return {"size": shard.size, "sha256": sha256, "header_xxh3_128": xxh3_128_hexdigest(shard.header)}


def _source(expert: Expert, plan: MergePlan) -> dict[str, Any]:
    """Identity of a model. Local folders are known by their name only: the manifest is pushed."""
    source = expert.source
    return {
        "id": source.repo_id or Path(source.path).name,
        "on_hub": source.repo_id is not None,
        "revision": source.revision,
        "commit": source.commit,
        "kind": source.kind,
        "files": input_files(expert, plan.carried),
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
    if outcome.decision is None:
        return {**entry, "donor": step.donor}
    entry |= {"n_blocks": step.n_blocks, "decision": _decision(outcome.decision), **(outcome.details or {})}
    return entry if outcome.geometry is None else {**entry, "geometry": vars(outcome.geometry)}


def _decision(decision: Decision) -> dict[str, Any]:
    """What the merged tensor comes from; coefficients have a file of their own."""
    if isinstance(decision, Trimming):
        return {"kind": "trimming", **vars(decision)}
    return {"kind": "coefficients"}
