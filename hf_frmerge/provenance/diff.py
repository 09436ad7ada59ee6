"""Compare the records of two merges: sources, arguments, environment, coefficients, files and evaluation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, load_record
from hf_frmerge.kernels.elementwise import Band, Elementwise
from hf_frmerge.merging.arguments.result_options import is_about_the_result
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE, read_coefficients
from hf_frmerge.merging.record.find_models import record_folder
from hf_frmerge.merging.record.manifest import read_manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.merging.record.manifest import Manifest
    from hf_frmerge.methods.spectral.decision import Spectral


@dataclass(frozen=True)
class Change:
    """Value that differs between two merges; `None` if one of them lacks it."""

    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class CoefficientDifference:
    """Largest difference between the coefficients of two merges, over the tensors, blocks and experts they share."""

    tensor: str
    block: int
    expert: str
    a: float
    b: float


@dataclass
class MergeDiff:
    """
    Differences between two merges, `a` and `b`.

    Attributes:
        sources: experts and bases that only one has, or whose commit, weight or content differs.
        arguments: arguments that affect the result.
        running: arguments that do not, library versions, and machine.
        files: files that differ; weight files only by their header, as their tensors are compared one by one.
        n_tensors: number of tensors in both.
        different_tensors: tensors in both that are not bit-identical.
        only_a, only_b: tensors that only one merge has.
        coefficients: largest difference; `None` if they are equal or cannot be compared.
        n_coefficients: number of tensors whose coefficients differ.
        n_thresholds: number of tensors in which a shared expert was trimmed at different magnitudes.
        evaluation: scores of the merged models that differ, as `domain: metric`, if both were evaluated.
    """

    sources: list[Change] = field(default_factory=list)
    arguments: list[Change] = field(default_factory=list)
    running: list[Change] = field(default_factory=list)
    files: list[Change] = field(default_factory=list)
    n_tensors: int = 0
    different_tensors: list[str] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    n_coefficients: int = 0
    n_thresholds: int = 0
    coefficients: CoefficientDifference | None = None
    evaluation: list[Change] = field(default_factory=list)

    @property
    def same_model(self) -> bool:
        """Whether all tensors and files of the two models are bit-identical."""
        return not (self.different_tensors or self.only_a or self.only_b or self.files)


def diff_merges(a: str, b: str, *, token: str | None = None) -> MergeDiff:
    """
    Compare two merges by their records; no weights are read.

    Args:
        a, b: Folders or Hub ids of two merges.
        token: Access token for the Hub.

    Raises:
        CheckpointError: If one of them is not a merge.
        HubError: If the Hub cannot be reached or refuses.
    """
    folders = [record_folder(model, token) for model in (a, b)]
    first, second = (read_manifest(folder) for folder in folders)
    diff = MergeDiff(sources=_sources(first, second))
    arguments = _changes(first.arguments, second.arguments)
    arguments += _changes(_resolved(first), _resolved(second))
    # By name, since `method` and `space` may differ both as an argument and as the resolved value.
    for change in {change.what: change for change in arguments}.values():
        (diff.arguments if is_about_the_result(change.what) else diff.running).append(change)
    diff.running += _changes(_environment(first), _environment(second))
    common = [name for name in first.tensors if name in second.tensors]
    diff.n_tensors = len(common)
    diff.only_a = [name for name in first.tensors if name not in second.tensors]
    diff.only_b = [name for name in second.tensors if name not in first.tensors]
    diff.different_tensors = [name for name in common if first.tensors[name].output != second.tensors[name].output]
    diff.files = _changes(_files(first), _files(second))
    tables = [
        read_coefficients(folder).rows if COEFFICIENTS_FILE in manifest.files else {}
        for folder, manifest in zip(folders, (first, second))
    ]
    # The base comes last in `models` and has no column of coefficients.
    experts = [_keys(manifest)[: len(manifest.experts)] for manifest in (first, second)]
    diff.n_coefficients, diff.coefficients = _coefficients(tables[0], tables[1], experts[0], experts[1])
    diff.n_thresholds = sum(
        _differ_in_thresholds(first.tensors[name].decision, second.tensors[name].decision, *experts) for name in common
    )
    records = [load_record(folder) for folder in folders]
    if records[0] is not None and records[1] is not None:
        diff.evaluation = _changes(_merged_scores(records[0]), _merged_scores(records[1]))
    return diff


def _resolved(manifest: Manifest) -> dict[str, Any]:
    """Return what the arguments came to, and what a merge was fitted to."""
    fitted: dict[str, Any] = {}
    if manifest.calibration is not None:
        fitted = {"fitted to prompts": manifest.calibration.digest, "form of the fit": manifest.calibration.form}
        if manifest.calibration.refinement is not None:
            fitted["steps of the refinement"] = manifest.calibration.refinement.best_step
    return {"method": manifest.method, "space": manifest.space, "output_kind": manifest.output_kind, **fitted}


def _changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    """List the keys whose values differ, in the order of `a`, then of `b`."""
    names = list(dict.fromkeys([*a, *b]))
    return [Change(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def _keys(manifest: Manifest) -> list[str]:
    """Return unique names of the recorded models; repeated ones are numbered: `math`, `math (2)`."""
    seen: Counter[str] = Counter()
    keys = []
    for model in manifest.models:
        # One model may be merged twice, with two weights; a dict by id would lose the first.
        seen[model.name] += 1
        keys.append(model.name if seen[model.name] == 1 else f"{model.name} ({seen[model.name]})")
    return keys


def _sources(a: Manifest, b: Manifest) -> list[Change]:
    """List experts and bases that only one merge has, or whose role, weight, commit or files differ."""
    facts = []
    for manifest in (a, b):
        entries: dict[str, dict[str, Any]] = {}
        for key, model in zip(_keys(manifest), manifest.models):
            role = "base model" if model is manifest.base_model else "expert"
            entries[key] = {"role": role, "weight": model.weight, "commit": model.commit}
            entries[key] |= {name: file.sha256 for part in model.parts for name, file in part.files.items()}
            if model.adapter is not None:
                entries[key]["commit"] = f"{model.commit}+{model.adapter.commit}"
        facts.append(entries)
    changes = []
    for key in dict.fromkeys([*facts[0], *facts[1]]):
        entry_a, entry_b = facts[0].get(key), facts[1].get(key)
        if entry_a is None or entry_b is None:
            changes.append(Change(key, entry_a and entry_a["role"], entry_b and entry_b["role"]))
            continue
        for change in _changes(entry_a, entry_b):
            # If the commits differ, their files do too: one line is enough. Files without a hash cannot be compared.
            is_file = change.what not in ("role", "weight", "commit")
            if not is_file or (entry_a["commit"] == entry_b["commit"] and None not in (change.a, change.b)):
                changes.append(Change(f"{key}: {change.what}", change.a, change.b))
    return changes


def _environment(manifest: Manifest) -> dict[str, Any]:
    """Collect library versions, machine, kernels and number of processes of a merge."""
    return {
        **manifest.all_versions,
        **vars(manifest.machine),
        "kernels": manifest.report.kernels,
        "n_processes": manifest.n_processes,
    }


def _files(manifest: Manifest) -> dict[str, Any]:
    """Return the SHA-256 of each file; for weights, whose tensors are compared one by one, the header's digest."""
    return {name: file.header_xxh3_128 or file.sha256 for name, file in manifest.files.items()}


def _coefficients(
    a: dict[str, NDArray[np.float64]], b: dict[str, NDArray[np.float64]], experts_a: list[str], experts_b: list[str]
) -> tuple[int, CoefficientDifference | None]:
    """
    Count the tensors whose coefficients differ, and find the largest difference.

    Args:
        a, b: Tensor -> coefficients, `(n_blocks, n_experts)`; one row is broadcast against many blocks.
        experts_a, experts_b: Names of the columns; only those in both are compared.
    """
    shared = [name for name in experts_a if name in experts_b]
    columns_a, columns_b = ([names.index(name) for name in shared] for names in (experts_a, experts_b))
    n_different, largest, size = 0, None, 0.0
    for tensor in [name for name in a if name in b]:
        rows_a, rows_b = a[tensor][:, columns_a], b[tensor][:, columns_b]
        if not shared or (len(rows_a) != len(rows_b) and 1 not in (len(rows_a), len(rows_b))):
            continue  # different block sizes: the rows do not correspond
        rows_a, rows_b = np.broadcast_arrays(rows_a, rows_b)
        gaps = np.abs(rows_a - rows_b)
        # `initial` for tensors without a block, whose max would raise an error.
        n_different += bool(gaps.max(initial=0.0) > 0)
        if gaps.max(initial=0.0) > size:
            size = float(gaps.max())
            block, expert = (int(index) for index in np.unravel_index(int(gaps.argmax()), gaps.shape))
            values = float(rows_a[block, expert]), float(rows_b[block, expert])
            largest = CoefficientDifference(tensor, block, shared[expert], *values)
    return n_different, largest


def _differ_in_thresholds(
    a: Elementwise | Spectral | None, b: Elementwise | Spectral | None, experts_a: list[str], experts_b: list[str]
) -> bool:
    """Whether a shared expert was trimmed at different magnitudes."""
    if not isinstance(a, Elementwise) or not isinstance(b, Elementwise):
        return False
    ends_a, ends_b = dict(zip(experts_a, _ends(a))), dict(zip(experts_b, _ends(b)))
    return any(ends_a[name] != ends_b[name] for name in ends_a.keys() & ends_b.keys())


def _ends(decision: Elementwise) -> list[tuple[float | None, ...]]:
    """Return the magnitudes between which each expert's elements were kept; none if that is not what decided."""
    if not isinstance(decision.keep, Band):
        return []
    upper = decision.keep.upper or [None] * len(decision.keep.lower)
    return list(zip(decision.keep.lower, upper))


def _merged_scores(record: EvaluationRecord) -> dict[str, float]:
    """Collect the scores and objectives of the merged model as `domain: metric` -> value."""
    numbers = {
        f"{score.domain}: {metric}": value
        for score in record.scores
        if score.model == MERGED
        for metric, value in score.metrics.items()
    }
    return numbers | {f"{row.domain}: objective": row.value for row in record.objectives}
