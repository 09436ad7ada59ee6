"""Make a recorded merge again from its manifest, and say whether every bit is the same."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

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
    A merge made again.

    Attributes:
        output_dir: where it is; `None` if it was compared and thrown away.
        n_tensors, n_files: how many were compared.
        differences: sentences on every tensor and file of the model that is not the same bit for bit.
        causes: sentences on what else is not as it was then: inputs, versions, machine.
    """

    output_dir: str | None = None
    n_tensors: int = 0
    n_files: int = 0
    differences: list[str] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Whether every tensor and file is the same bit for bit."""
        return not self.differences


def reproduce(
    model: str,
    output_dir: str | None = None,
    *,
    experts: Mapping[str, Sequence[str]] | None = None,
    device: str | None = None,
    token: str | None = None,
    observer: StepObserver | None = None,
) -> Reproduction:
    """
    Make a merge again from its record: the experts at their recorded commits, with the recorded arguments.

    Only the record of a pushed merge is fetched, not its weights: their digests are in it.

    Args:
        model: Folder of a merge, or its Hub id.
        output_dir: Where to write; by default a temporary folder, gone when the comparison is done.
        experts: Name of a recorded model -> where it is now, one place for each model of that name. Needed for models
            that were local and are not on this machine.
        device: Where to compute, if not where it was.
        token: Token for the Hub.
        observer: Told about every tensor.

    Raises:
        MergeError: If the record cannot be read, a model not be found, or the merge fails.
    """
    folder = record_folder(model, token)
    manifest = read_manifest(folder)
    models = find_models(folder, manifest, by_name(manifest, experts or {}), option="--expert NAME=PATH")
    changes = {"device": device} if device else {}
    with TemporaryDirectory(prefix="frmerge-reproduce-") as temporary:
        made = output_dir or str(Path(temporary) / "merged")
        with closing(plan_again(manifest, models, folder, output_dir=made, hub_token=token, **changes)) as plan:
            run_merge(plan, _AsRecorded(manifest, observer or StepObserver()), Processes())
        reproduction = compare_records(manifest, read_manifest(made))
    reproduction.output_dir = output_dir
    return reproduction


def compare_records(recorded: Manifest, made: Manifest) -> Reproduction:
    """Compare the digests of two merges that should be one."""
    found = Reproduction(n_tensors=len(made.tensors))
    for name in sorted(recorded.tensors.keys() | made.tensors.keys()):
        then, now = recorded.tensors.get(name), made.tensors.get(name)
        if then is None or now is None:
            found.differences.append(f"Tensor {name!r} is only in the {'new' if then is None else 'recorded'} merge.")
        elif then.output != now.output:
            found.differences.append(f"Tensor {name!r} differs.")
    for name in sorted(recorded.files.keys() | made.files.keys()):
        before, after = recorded.files.get(name), made.files.get(name)
        found.n_files += 1
        if before is None or after is None:
            found.differences.append(f"File {name} is only in the {'new' if before is None else 'recorded'} merge.")
        elif not _same_file(before, after):
            found.differences.append(f"File {name} differs.")
    found.causes = _causes(recorded, made)
    return found


class _AsRecorded(StepObserver):
    """Skips the tensors that a callback skipped in the recorded merge."""

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
    """Compare what both records know; weight files too large to be hashed are compared tensor by tensor."""
    pairs = [(then.size, now.size), (then.sha256, now.sha256), (then.header_xxh3_128, now.header_xxh3_128)]
    return all(a == b for a, b in pairs if None not in (a, b))


def _causes(recorded: Manifest, made: Manifest) -> list[str]:
    causes = []
    for index, (then, now) in enumerate(zip(recorded.models, made.models)):
        role = str(index if index < len(recorded.experts) else -1)
        shared = then.files.keys() & now.files.keys()
        changed = [name for name in sorted(shared) if not _same_file(then.files[name], now.files[name])]
        tensors = [
            name
            for name, tensor in recorded.tensors.items()
            if role in tensor.inputs and made.tensors.get(name, tensor).inputs.get(role) != tensor.inputs[role]
        ]
        if changed or tensors:
            parts = [", ".join(changed)] if changed else []
            parts += [f"{len(tensors)} tensors, such as {tensors[0]!r}"] if tensors else []
            causes.append(f"{then.id} is not what was merged then; different: {'; '.join(parts)}.")
    if recorded.report.kernels != made.report.kernels:
        causes.append(f"Computed with the kernels {made.report.kernels}, then with {recorded.report.kernels}.")
    if recorded.machine != made.machine:
        here, there = (f"{record.machine.architecture} {record.machine.system}" for record in (made, recorded))
        causes.append(f"Computed on {here}, then on {there}.")
    versions = recorded.all_versions
    for name in sorted(versions.keys() & made.all_versions.keys()):
        if versions[name] != made.all_versions[name]:
            causes.append(f"{name} {made.all_versions[name]}, then {versions[name]}.")
    return causes
