"""What calibration found for a merge: coefficients, or corrections to add to the tensors that a method gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from xxhash import xxh3_128

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_tensors_file
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

CORRECTIONS_FILE = "merge_corrections.safetensors"

_PART = 1 << 24  # bytes read at a time

_PARTS = ("refinement", "starts", "neutral")  # of the record of a calibration, which not all have

Form = Literal["start", "table", "low_rank", "dense"]
"""
Form of what was found: nothing, coefficients of the experts for every row, or corrections: factors of low rank, or one
number for every weight.
"""


def mean_known(distances: Sequence[float | None]) -> float:
    """Return the mean of the distances to experts that have held-out prompts."""
    known = [value for value in distances if value is not None]
    return sum(known) / len(known)


def nearest_start(starts: Mapping[str, Sequence[float | None]]) -> str:
    """Return the candidate of the smallest mean distance: the first of equals, and a finite one if there is any."""
    means = {label: mean_known(row) for label, row in starts.items()}
    return min(means, key=lambda label: (not math.isfinite(means[label]), means[label]))


@dataclass(frozen=True)
class RefinementRecord:
    """
    How a fitted merge was refined: all layers together, by gradient.

    Attributes:
        steps: number of steps.
        loss: the option `refine_loss`, between the predictions, or `"angle"` between the hidden states.
        learning_rate: highest step size.
        began_from: form of the fit that it began from; `"start"` if the fit gained nothing.
        best_step: number of steps that led to what was written; 0 if no judged point was better than the fit.
    """

    steps: int
    loss: str
    learning_rate: float
    began_from: Form
    best_step: int


@dataclass(frozen=True)
class NeutralRecord:
    """
    How far a fitted merge of language models is from its base, on prompts that the base wrote.

    Attributes:
        prompts, tokens: how many.
        distance: mean squared Fisher–Rao distance of the merge's predictions to the base's, in rad².
        nats: mean Kullback–Leibler divergence of the merge's predictions from the base's, in nats a token: how much
            worse than the base the merge predicts what the base writes.
    """

    prompts: int
    tokens: int
    distance: float
    nats: float


@dataclass(frozen=True)
class CalibrationRecord:
    """
    How a merge was fitted on prompts, and what that gains.

    Attributes:
        prompts: number of prompts of every expert that took part in the fit.
        held_out: number of prompts of every expert that judged it.
        tokens: number of tokens of all prompts.
        source: where the prompts came from: `"file"`, `"dataset"`, or, if the experts wrote them, `"self"`, or
            `"self:chat"` behind the chat template.
        digest: XXH3-128 of their token ids.
        options: settings of the fit, by name.
        form: form that was chosen: of what is written.
        distances: form -> squared Fisher–Rao distance of the merge's predictions to every expert's, in rad², mean over
            the tokens of its held-out prompts; of a model without a head, the squared angle of hidden states. After a
            refinement its best point is `"refined"`.
        seconds: CPU time of the fit.
        refinement: how it was refined; `None` if it was not.
        starts: merge without data -> its distances, as in `distances`, if the start was chosen among several; `None`
            if it was given. The fit started from the nearest.
        neutral: what it does to text that belongs to no expert; `None` if that was not measured.
    """

    prompts: tuple[int, ...]
    held_out: tuple[int, ...]
    tokens: int
    source: str
    digest: str
    options: dict[str, Any]
    form: Form
    distances: dict[str, tuple[float | None, ...]]
    seconds: float
    refinement: RefinementRecord | None = None
    starts: dict[str, tuple[float | None, ...]] | None = None
    neutral: NeutralRecord | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without the parts that there are none of."""
        return {name: value for name, value in asdict(self).items() if name not in _PARTS or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CalibrationRecord:
        """Read a record from the values of `to_dict`."""
        fields_of = {field.name: values[field.name] for field in fields(cls) if field.name not in _PARTS}
        for name, part_class in (("refinement", RefinementRecord), ("neutral", NeutralRecord)):
            part = values.get(name)
            if part is not None:
                fields_of[name] = part_class(**{field.name: part[field.name] for field in fields(part_class)})
        if values.get("starts") is not None:
            fields_of["starts"] = {label: tuple(row) for label, row in values["starts"].items()}
        for name in ("prompts", "held_out"):
            fields_of[name] = tuple(fields_of[name])
        fields_of["distances"] = {form: tuple(row) for form, row in values["distances"].items()}
        return cls(**fields_of)

    @property
    def is_judged_by_predictions(self) -> bool:
        """Whether the distances are between predictions, or between hidden states."""
        return self.options.get("judged_by", "predictions") == "predictions"

    @property
    def is_corrected(self) -> bool:
        """Whether the merge is another one than that without data."""
        return self.form != "start"

    @property
    def has_corrections(self) -> bool:
        """Whether something is added to a merge after its coefficients, and what these give, were measured."""
        return self.form not in ("start", "table")

    @property
    def method(self) -> str | None:
        """The method that the corrections belong to; `None` if a merge by any method was fitted to its experts."""
        method: str | None = self.options.get("method")
        return method

    @property
    def fisher(self) -> str | None:
        """The Fisher information that lengths and angles were measured by: `"diagonal"`, `"kfac"` or none."""
        fisher: str | None = self.options.get("fisher")
        return fisher

    @property
    def is_fitted(self) -> bool:
        """Whether the merge was fitted to its experts, beyond what its method gives, and is the better for it."""
        return self.is_corrected and self.method is None and self.fisher is None

    @property
    def is_refined(self) -> bool:
        """Whether what is written is the outcome of a refinement."""
        return self.refinement is not None and self.refinement.best_step > 0

    @property
    def written(self) -> str:
        """What is written, as `distances` names it."""
        return "refined" if self.is_refined else self.form

    def mean_distance(self, form: str) -> float:
        """Return the mean over the experts that have held-out prompts."""
        return mean_known(self.distances[form])


@dataclass(frozen=True)
class Corrections:
    """
    Open file of corrections.

    Attributes:
        checkpoint: its tensors: `NAME`, or the factors `NAME.up` and `NAME.down`.
        digest: XXH3-128 of the file.
    """

    checkpoint: Checkpoint
    digest: str


def read_corrections(folder: str) -> Corrections:
    """
    Open the corrections in a folder, local or behind a URL.

    Raises:
        CheckpointError: If there are none, or the file is damaged.
    """
    if not open_folder(folder).exists(CORRECTIONS_FILE):
        raise CheckpointError(
            f"{folder} has no {CORRECTIONS_FILE}, which its model was made with. Restore the file, or calibrate again."
        )
    checkpoint, digest = open_tensors_file(folder, CORRECTIONS_FILE), xxh3_128()
    for part in _parts(checkpoint):
        digest.update(part)
    return Corrections(checkpoint, digest.hexdigest())


def keep_corrections(corrections: Corrections, target: Path) -> None:
    """Copy the file of corrections to where the record of a merge lies."""
    write_file(target, _parts(corrections.checkpoint))


def _parts(checkpoint: Checkpoint) -> Iterator[bytes]:
    """Read the file in parts: dense corrections are as large as the model."""
    size = checkpoint.files[CORRECTIONS_FILE]
    for start in range(0, size, _PART):
        yield checkpoint.folder.read(CORRECTIONS_FILE, start, min(start + _PART, size))
