"""Repeat a recorded merge from its manifest, and compare the result bit for bit."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.record.find_models import by_name, find_models, record_folder
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.plan_again import plan_again

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hf_frmerge.merging.planning.tensor_step import TensorStep
    from hf_frmerge.merging.record.manifest import Manifest
    from hf_frmerge.merging.record.manifest_entries import RecordedFile


@dataclass
class Reproduction:
    """
    Result of repeating a merge.

    Attributes:
        output_dir: folder of the new model; `None` if it was compared and deleted.
        n_tensors, n_files: number of tensors and files compared.
        differences: a sentence for every tensor and file that is not bit-identical.
        causes: sentences on possible causes: inputs, library versions or machine that changed since.
    """

    output_dir: str | None = None
    n_tensors: int = 0
    n_files: int = 0
    differences: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether all tensors and files are bit-identical."""
        return not self.differences


def reproduce(
    model: str,
    output_dir: str | None = None,
    *,
    experts: Mapping[str, Sequence[str]] | None = None,
    device: str | None = None,
    token: str | None = None,
    allow_pickle: bool = False,
    observer: StepObserver | None = None,
) -> Reproduction:
    """
    Repeat a merge with the recorded arguments, taking the experts at their recorded commits.

    Of a pushed merge only the record is downloaded, not the weights: the record has their digests.

    Args:
        model: Folder or Hub id of a merge.
        output_dir: Output folder; by default a temporary one, deleted after the comparison.
        experts: Name of a recorded model -> its current places, one for each model of that name. Needed for local
            models that are not where they were.
        device: Device to compute on; by default the recorded one.
        token: Access token for the Hub.
        allow_pickle: Whether the weights of the models may be pickles, whatever was allowed for the merge.
        observer: Called for every tensor.

    Raises:
        MergeError: If the record cannot be read, a model cannot be found, or the merge fails.
    """
    folder = record_folder(model, token)
    manifest = read_manifest(folder)
    models = find_models(folder, manifest, by_name(manifest, experts or {}), option="--expert NAME=PATH")
    changes: dict[str, Any] = {"allow_pickle": allow_pickle, **({"device": device} if device else {})}
    with TemporaryDirectory(prefix="frmerge-reproduce-") as temporary:
        made = output_dir or str(Path(temporary) / "merged")
        # A token of this session, as records never contain one.
        with closing(plan_again(manifest, models, folder, output_dir=made, hub_token=token, **changes)) as plan:
            run_merge(plan, _AsRecorded(manifest, observer or StepObserver()), Processes())
        reproduction = compare_records(manifest, read_manifest(made))
    reproduction.output_dir = output_dir
    return reproduction


def compare_records(recorded: Manifest, made: Manifest) -> Reproduction:
    """Compare the digests that two manifests record; no weights are read."""
    result = Reproduction(n_tensors=len(made.tensors))
    # The union, so that a tensor that only one merge has counts as a difference.
    for name in sorted(recorded.tensors.keys() | made.tensors.keys()):
        then, now = recorded.tensors.get(name), made.tensors.get(name)
        if then is None or now is None:
            result.differences.append(f"Tensor {name!r} is only in the {'new' if then is None else 'recorded'} merge.")
        elif then.output != now.output:
            result.differences.append(f"Tensor {name!r} differs.")
    for name in sorted(recorded.files.keys() | made.files.keys()):
        before, after = recorded.files.get(name), made.files.get(name)
        result.n_files += 1
        if before is None or after is None:
            result.differences.append(f"File {name} is only in the {'new' if before is None else 'recorded'} merge.")
        elif not _same_file(before, after):
            result.differences.append(f"File {name} differs.")
    result.causes = _causes(recorded, made)
    return result


class _AsRecorded(StepObserver):
    """Observer that skips the tensors a callback skipped in the recorded merge: the record has no callback to run."""

    def __init__(self, manifest: Manifest, observer: StepObserver) -> None:
        self._tensors = manifest.tensors
        self._observer = observer

    def begin(self, step: TensorStep) -> bool:
        self._observer.begin(step)
        recorded = self._tensors.get(step.name)
        return recorded is None or recorded.action != "skip"

    def end(self, outcome: StepOutcome) -> bool:
        return self._observer.end(outcome)


def _same_file(then: RecordedFile, now: RecordedFile) -> bool:
    """Compare size and checksums, as far as both have them; weights that were not hashed are compared by tensor."""
    pairs = [(then.size, now.size), (then.sha256, now.sha256), (then.header_xxh3_128, now.header_xxh3_128)]
    return all(a == b for a, b in pairs if None not in (a, b))


def _causes(recorded: Manifest, made: Manifest) -> list[str]:
    """List what changed since the recorded merge and may explain a difference: inputs, kernels, machine, versions."""
    causes = []
    for index, (then, now) in enumerate(zip(recorded.models, made.models)):
        # Inputs are recorded under the expert's index as a string, the base model's under -1.
        role = str(index if index < len(recorded.experts) else -1)
        shared = then.files.keys() & now.files.keys()
        changed = [name for name in sorted(shared) if not _same_file(then.files[name], now.files[name])]
        tensors = [
            name
            for name, tensor in recorded.tensors.items()
            if role in tensor.inputs and made.tensors.get(name, tensor).inputs.get(role) != tensor.inputs[role]
        ]
        if changed or tensors:
            changed_parts = [", ".join(changed)] if changed else []
            changed_parts += [f"{len(tensors)} tensors, such as {tensors[0]!r}"] if tensors else []
            causes.append(f"{then.id} is not what was merged then; different: {'; '.join(changed_parts)}.")
    if recorded.report.kernels != made.report.kernels:
        causes.append(f"Computed with the kernels {made.report.kernels}, then with {recorded.report.kernels}.")
    if recorded.machine != made.machine:
        now_on, then_on = (f"{record.machine.architecture} {record.machine.system}" for record in (made, recorded))
        causes.append(f"Computed on {now_on}, then on {then_on}.")
    versions = recorded.all_versions
    for name in sorted(versions.keys() & made.all_versions.keys()):
        if versions[name] != made.all_versions[name]:
            causes.append(f"{name} {made.all_versions[name]}, then {versions[name]}.")
    return causes
