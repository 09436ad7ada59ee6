"""Recompute a merged model from its experts and its coefficient table, and compare it bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from hf_frmerge.checkpoints.resolve import Source, resolve
from hf_frmerge.checkpoints.tensors.floats import SIGNIFICANT_BITS, widen
from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS, open_checkpoint, unchanged
from hf_frmerge.errors import CheckpointError, NonFiniteError
from hf_frmerge.kernels.elementwise import Elementwise
from hf_frmerge.kernels.interface import digest
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.engine.engine import worker_count
from hf_frmerge.merging.operands.apply import apply
from hf_frmerge.merging.operands.open_inputs import open_tensors
from hf_frmerge.merging.operands.tensor_inputs import join_digests
from hf_frmerge.merging.planning.blocks import pieces_of
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE, read_coefficients
from hf_frmerge.merging.record.checksums import header_digest, sha256_of
from hf_frmerge.merging.record.find_models import find_models
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.record.write_manifest import record_checksums
from hf_frmerge.methods.spectral.decision import RULES, Spectral, tolerance
from hf_frmerge.provenance.compare_adapter import compare_adapter
from hf_frmerge.provenance.plan_again import plan_again

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.decisions import Decision
    from hf_frmerge.merging.operands.tensor_inputs import TensorInputs
    from hf_frmerge.merging.planning.blocks import Piece
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep
    from hf_frmerge.merging.record.manifest import Manifest
    from hf_frmerge.merging.record.manifest_entries import RecordedTensor


@dataclass
class VerifyReport:
    """
    Result of a verification.

    Attributes:
        checked_files, checked_tensors: number of files and tensors compared.
        problems: a sentence for every problem.
        without_sha256: inputs, as `model: file`, whose SHA-256 could not be recorded: missing or changed.
    """

    checked_files: int = 0
    checked_tensors: int = 0
    problems: list[str] = field(default_factory=list)
    without_sha256: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def verify(
    output_dir: str,
    *,
    experts: Sequence[str] | None = None,
    base_model: str | None = None,
    sha256: bool = False,
    allow_pickle: bool = False,
) -> VerifyReport:
    """
    Check a merged model against its record and its experts.

    Small files are compared by SHA-256, weight files by header and tensors. Every merged tensor is recomputed from the
    experts and the recorded decision, and compared bit for bit. The decision itself is not made again. What went
    through LAPACK, which differs in its last digits from machine to machine, is compared with the digest of what was
    written, and with what is computed here to `methods.spectral.decision.tolerance` of the merged delta.

    Args:
        output_dir: Folder or Hub id of the merged model.
        experts: Current places of all experts in order; by default the recorded ones.
        base_model: Current place of the base model; by default the recorded one.
        sha256: Whether to compare weight files by SHA-256 too and, if no problem was found, to add missing checksums
            to the manifest.
        allow_pickle: Whether the weights of the experts may be pickles, whatever was allowed for the merge.

    Raises:
        CheckpointError: If the folder is not a merge, or the experts cannot be found.
    """
    folder = _folder(output_dir)
    manifest = read_manifest(folder)
    report = VerifyReport()
    _check_files(folder, manifest, report, sha256)
    try:
        coefficients = read_coefficients(folder).rows if COEFFICIENTS_FILE in manifest.files else {}
        merged = open_checkpoint(Source(output_dir, manifest.output_kind, str(folder)))
    except CheckpointError as error:  # without tensors or coefficients only the files could be checked
        report.problems.append(str(error))
        return report
    with closing(merged), closing(_plan(folder, manifest, experts, base_model, allow_pickle)) as plan:
        if plan.layout is None:
            report.checked_tensors, problems = compare_adapter(merged, manifest, plan)
            report.problems += problems
        else:
            with unchanged([merged, *plan.opened]):
                _check_model(merged, coefficients, manifest, plan, report)
    if (
        sha256 and report.ok and folder == Path(output_dir)
    ):  # for a Hub id the folder is in the cache, whose files must not change
        report.without_sha256 = record_checksums(folder)
    return report


def _folder(output_dir: str) -> Path:
    """Return the folder of a merge, downloading all its recorded files from the Hub; the report lists missing ones."""
    if Path(output_dir).is_dir():
        return Path(output_dir)
    source = resolve(output_dir)
    if source.commit is None:
        return Path(source.path)
    files = read_manifest(Path(source.path)).files
    # Pinned to the commit of the first request, in case someone pushes between the two.
    return Path(resolve(f"{source.repo_id}@{source.commit}", extra=tuple(files)).path)


def _check_model(
    merged: Checkpoint,
    coefficients: dict[str, NDArray[np.float64]],
    manifest: Manifest,
    plan: MergePlan,
    report: VerifyReport,
) -> None:
    """Recompute every tensor and compare it bit for bit."""
    kernels = load_kernels()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(worker_count(plan)) as pool:
        work = [(step, manifest.tensors.get(step.name), coefficients.get(step.name)) for step in plan.steps]
        problems = pool.map(lambda item: _check_tensor(plan, kernels, merged, *item), work)
        for problem in problems:
            report.checked_tensors += 1
            report.problems += [problem] if problem else []
    # The loop above goes through the experts' tensors only, so an added one would pass unnoticed.
    extra = sorted(set(merged.tensors) - {step.name for step in plan.steps})
    report.problems += [f"Tensor {name!r} is in the merged model, but its experts have none." for name in extra]


def _check_files(folder: Path, manifest: Manifest, report: VerifyReport, sha256: bool) -> None:
    """Compare every recorded file by size, then by the digest of its header or by SHA-256."""
    for name, entry in manifest.files.items():
        report.checked_files += 1
        path = folder / name
        if not path.exists():
            report.problems.append(f"File {name} is missing.")
            continue
        # Hashing weights by default would read them twice: the header is compared here, the tensors later.
        is_hashed = entry.sha256 is not None and (sha256 or entry.header_xxh3_128 is None)
        if path.stat().st_size != entry.size:
            report.problems.append(f"File {name} has {path.stat().st_size} bytes, {entry.size} were written.")
        elif entry.header_xxh3_128 is not None and header_digest(path) != entry.header_xxh3_128:
            report.problems.append(f"The header of {name} was changed after the merge.")
        elif is_hashed and sha256_of(path) != entry.sha256:
            report.problems.append(f"File {name} was changed after the merge.")


def _plan(
    folder: Path, manifest: Manifest, experts: Sequence[str] | None, base_model: str | None, allow_pickle: bool
) -> MergePlan:
    """Rebuild the plan of the merge from its manifest."""
    n_experts = len(manifest.experts)
    if experts is not None and len(experts) != n_experts:
        raise CheckpointError(
            f"The merge had {n_experts} experts, but {len(experts)} were given. Give all, in their order."
        )
    chosen = [*(experts if experts is not None else [None] * n_experts), base_model]
    models = find_models(folder, manifest, chosen, option="--experts and --base-model")
    return plan_again(manifest, models, str(folder), allow_pickle=allow_pickle)


def _check_tensor(
    plan: MergePlan,
    kernels: Kernels,
    merged: Checkpoint,
    step: TensorStep,
    entry: RecordedTensor | None,
    coefficients: NDArray[np.float64] | None,
) -> str | None:
    """Recompute one tensor piece by piece, and return a sentence if it differs, else `None`."""
    info = merged.tensors.get(step.name)
    if entry is None or info is None:
        return f"Tensor {step.name!r} is missing in the {'manifest' if entry is None else 'merged model'}."
    if (info.dtype, info.shape) != (step.dtype, step.shape):
        return f"Tensor {step.name!r} is {info.dtype} {list(info.shape)}, expected {step.dtype} {list(step.shape)}."
    # A callback skipped it, so it was copied; the plan cannot know that.
    if step.action == "merge" and entry.action == "skip":
        step = plan.copied(step)
    decision = entry.decision_with(coefficients) if step.action == "merge" else None
    if step.action == "merge" and not _fits(decision, plan, step):
        return f"Tensor {step.name!r} was merged, but the record has no {_named(entry)} that fit it."
    inputs = open_tensors(plan, step)
    size = DTYPE_BITS[step.dtype] // 8
    for piece in pieces_of(step):
        expected = np.empty((piece.stop - piece.start) * size, np.uint8)
        try:
            if decision is not None:
                apply(inputs, decision, kernels, piece, expected, step.dtype)
            else:
                expected, _ = inputs.copy(kernels, piece, expected, step.dtype)
        except NonFiniteError as error:
            return str(error)
        actual = merged.read(step.name, piece.start * size, piece.stop * size)
        if step.is_matrix:  # through LAPACK
            if digest(actual) != entry.output:
                return f"Tensor {step.name!r} was changed after the merge."
            allowed = tolerance(plan.args.method)
            if not _is_near(expected, actual, inputs, piece, step.dtype, allowed):
                return (
                    f"Tensor {step.name!r} is farther than {allowed:g} of its delta from what its experts and "
                    f"{_named(entry)} give."
                )
        elif not np.array_equal(expected, actual):
            # By element, not by byte: an element differs if any of its bytes does.
            wrong = int(np.count_nonzero((expected != actual).reshape(-1, size).any(axis=1)))
            sentence = (
                f"Tensor {step.name!r} differs from what its experts and {_named(entry)} give in {wrong:,} elements"
            )
            changed = _changed_inputs(inputs, step, entry.inputs)
            return (
                f"{sentence}; it was changed in {' and '.join(changed)} after the merge."
                if changed
                else f"{sentence}."
            )
        inputs.release(piece)
        merged.release(step.name, piece.start * size, piece.stop * size)
    return None


def _is_near(
    expected: NDArray[np.uint8],
    actual: NDArray[np.uint8],
    inputs: TensorInputs,
    piece: Piece,
    dtype: str,
    allowed: float,
) -> bool:
    """Whether a matrix is what it would be here, to `allowed` of its delta, and rounding."""
    assert inputs.base is not None
    operand = inputs.base.read(piece.start, piece.stop)
    origin = widen(operand.data, operand.dtype).astype(np.float64)
    here, there = (widen(data, dtype).astype(np.float64) for data in (expected, actual))
    rounding = 2.0 ** -SIGNIFICANT_BITS[dtype] * np.linalg.norm(here)
    return bool(np.linalg.norm(here - there) <= allowed * np.linalg.norm(here - origin) + rounding)


def _changed_inputs(inputs: TensorInputs, step: TensorStep, recorded: dict[str, str]) -> list[str]:
    """List the models whose tensor has changed since the merge."""
    parts = [inputs.digests(piece) for piece in pieces_of(step)]
    digests = {owner: join_digests([part[owner] for part in parts]) for owner in parts[0]}
    return [inputs.labels[owner] for owner, value in digests.items() if recorded.get(str(owner)) != value]


def _fits(decision: Decision | None, plan: MergePlan, step: TensorStep) -> bool:
    """Whether a recorded decision has the shape this tensor needs: one row of coefficients, or one per block."""
    n_experts = len(plan.experts)
    if isinstance(decision, Spectral):
        return len(decision.weights) == n_experts and decision.rule in RULES and step.is_matrix
    if isinstance(decision, Elementwise):
        sizes = [len(numbers) for numbers in vars(decision.keep).values() if isinstance(numbers, tuple)]
        return {len(decision.weights), len(decision.votes or decision.weights), *sizes} == {n_experts}
    return decision is not None and decision.coefficients.shape in ((1, n_experts), (step.n_blocks, n_experts))


def _named(entry: RecordedTensor) -> str:
    """Name what the record decided a tensor by, for messages."""
    return "coefficients" if entry.decision is None else "decision"
