"""How two merges differ, read from their records: in what went in, in what was done, and in what came out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, load_record
from hf_frmerge.merging.arguments.result_options import is_about_the_result
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE, read_coefficients
from hf_frmerge.merging.record.find_models import record_folder
from hf_frmerge.merging.record.manifest import read_manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.merging.decisions import Trimming
    from hf_frmerge.merging.record.manifest import Manifest


@dataclass(frozen=True)
class Change:
    """Something that is not the same in both; `None` where one does not have it."""

    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class CoefficientDifference:
    """The largest difference between the coefficients of two merges, over tensors, blocks and experts of both."""

    tensor: str
    block: int
    expert: str
    a: float
    b: float


@dataclass
class MergeDiff:
    """
    How two merges differ.

    Attributes:
        sources: experts and bases that are in one only, or at another commit, weight or content.
        arguments: arguments that decide the result.
        running: arguments, versions and machine that need not.
        files: files of the model, other than weights compared tensor by tensor.
        n_tensors: tensors of both.
        different_tensors: those that are not the same bit for bit.
        only_a, only_b: tensors of one only.
        coefficients: `None` if they are the same, or cannot be compared.
        n_coefficients: tensors whose coefficients differ.
        n_thresholds: tensors in which an expert of both was trimmed from another magnitude on.
        evaluation: measured numbers of the merged models, `domain: metric`, if both were evaluated.
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
        """Whether every tensor and file of the two models is the same bit for bit."""
        return not (self.different_tensors or self.only_a or self.only_b or self.files)


def diff_merges(a: str, b: str, *, token: str | None = None) -> MergeDiff:
    """
    Compare two merges by their records; no weights are read.

    Args:
        a, b: Folders of merges, or their Hub ids.
        token: Token for the Hub.

    Raises:
        CheckpointError: If one holds no merge.
        HubError: If the Hub cannot be reached or refuses.
    """
    folders = [record_folder(model, token) for model in (a, b)]
    first, second = (read_manifest(folder) for folder in folders)
    diff = MergeDiff(sources=_sources(first, second))
    arguments = _changes(first.arguments, second.arguments)
    arguments += _changes(
        *({"method": m.method, "space": m.space, "output_kind": m.output_kind} for m in (first, second))
    )
    for change in {change.what: change for change in arguments}.values():
        (diff.arguments if is_about_the_result(change.what) else diff.running).append(change)
    diff.running += _changes(_surroundings(first), _surroundings(second))
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
    experts = [_keys(manifest)[: len(manifest.experts)] for manifest in (first, second)]
    diff.n_coefficients, diff.coefficients = _coefficients(tables[0], tables[1], experts[0], experts[1])
    diff.n_thresholds = sum(
        _differ_in_thresholds(first.tensors[name].decision, second.tensors[name].decision, *experts) for name in common
    )
    records = [load_record(folder) for folder in folders]
    if records[0] is not None and records[1] is not None:
        diff.evaluation = _changes(_numbers(records[0]), _numbers(records[1]))
    return diff


def _changes(a: dict[str, Any], b: dict[str, Any]) -> list[Change]:
    names = list(dict.fromkeys([*a, *b]))
    return [Change(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def _keys(manifest: Manifest) -> list[str]:
    """Names of the recorded models, told apart where they repeat: `math`, `math (2)`."""
    seen: Counter[str] = Counter()
    keys = []
    for model in manifest.models:
        seen[model.id] += 1
        keys.append(model.id if seen[model.id] == 1 else f"{model.id} ({seen[model.id]})")
    return keys


def _sources(a: Manifest, b: Manifest) -> list[Change]:
    facts = []
    for manifest in (a, b):
        known: dict[str, dict[str, Any]] = {}
        for key, model in zip(_keys(manifest), manifest.models):
            role = "base model" if model is manifest.base_model else "expert"
            known[key] = {"role": role, "weight": model.weight, "commit": model.commit}
            known[key] |= {name: file.sha256 for name, file in model.files.items()}
        facts.append(known)
    changes = []
    for key in dict.fromkeys([*facts[0], *facts[1]]):
        mine, theirs = facts[0].get(key), facts[1].get(key)
        if mine is None or theirs is None:
            changes.append(Change(key, mine and mine["role"], theirs and theirs["role"]))
            continue
        for change in _changes(mine, theirs):
            # Files of another commit, and those that were not hashed, are not worth a line.
            is_file = change.what not in ("role", "weight", "commit")
            if not is_file or (mine["commit"] == theirs["commit"] and None not in (change.a, change.b)):
                changes.append(Change(f"{key}: {change.what}", change.a, change.b))
    return changes


def _surroundings(manifest: Manifest) -> dict[str, Any]:
    return {
        **manifest.all_versions,
        **vars(manifest.machine),
        "kernels": manifest.report.kernels,
        "n_processes": manifest.n_processes,
    }


def _files(manifest: Manifest) -> dict[str, Any]:
    """SHA-256 of the files; of weights, which are compared tensor by tensor, the digest of their header."""
    return {name: file.header_xxh3_128 or file.sha256 for name, file in manifest.files.items()}


def _coefficients(
    a: dict[str, NDArray[np.float64]], b: dict[str, NDArray[np.float64]], experts_a: list[str], experts_b: list[str]
) -> tuple[int, CoefficientDifference | None]:
    """Count the tensors whose coefficients differ, and find the largest difference; experts are matched by name."""
    shared = [name for name in experts_a if name in experts_b]
    columns_a, columns_b = ([names.index(name) for name in shared] for names in (experts_a, experts_b))
    n_different, largest, size = 0, None, 0.0
    for tensor in [name for name in a if name in b]:
        mine, theirs = a[tensor][:, columns_a], b[tensor][:, columns_b]
        if not shared or (len(mine) != len(theirs) and 1 not in (len(mine), len(theirs))):
            continue  # cut into blocks of another kind
        mine, theirs = np.broadcast_arrays(mine, theirs)
        gaps = np.abs(mine - theirs)
        n_different += bool(gaps.max(initial=0.0) > 0)
        if gaps.max(initial=0.0) > size:
            size = float(gaps.max())
            block, expert = (int(index) for index in np.unravel_index(int(gaps.argmax()), gaps.shape))
            values = float(mine[block, expert]), float(theirs[block, expert])
            largest = CoefficientDifference(tensor, block, shared[expert], *values)
    return n_different, largest


def _differ_in_thresholds(a: Trimming | None, b: Trimming | None, experts_a: list[str], experts_b: list[str]) -> bool:
    """Tell whether an expert of both was trimmed at another magnitude."""
    if a is None or b is None:
        return False
    mine, theirs = dict(zip(experts_a, a.thresholds)), dict(zip(experts_b, b.thresholds))
    return any(mine[name] != theirs[name] for name in mine.keys() & theirs.keys())


def _numbers(record: EvaluationRecord) -> dict[str, float]:
    """Scores of the merged model, and its objective, by domain."""
    numbers = {
        f"{score.domain}: {metric}": value
        for score in record.scores
        if score.model == MERGED
        for metric, value in score.metrics.items()
    }
    return numbers | {f"{row.domain}: objective": row.value for row in record.objectives}
