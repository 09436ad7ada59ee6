"""Dataclasses a model card is rendered from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_frmerge.hub.card.licences import SourceMetadata
from hf_frmerge.hub.card.tasks import Task
from hf_frmerge.methods.entries.span import FISHER_RAO
from hf_frmerge.methods.method import Paper
from hf_frmerge.wording.geometry import Geometry
from hf_frmerge.wording.methods import method_of

if TYPE_CHECKING:
    from hf_frmerge.evaluation.record import EvaluationRecord
    from hf_frmerge.merging.planning.corrections import CalibrationRecord

TAG_NAMES = ("merge", "hf-frmerge")
NAME = "Fisher–Rao merging"
TEMPLATE_FILE = str(Path(__file__).with_name("templates") / "model_card.md.jinja")


@dataclass(frozen=True)
class CardSource:
    """
    One model or adapter of the merge.

    Args:
        spec (`str`):
            Hub id or local path, as the user gave it. The card shows only the last part of a path.
        repo_id (`str` or `None`):
            Hub id if the source came from the Hub; `None` for a local folder.
        commit (`str` or `None`):
            Commit the Hub id was resolved to.
        weight (`float` or `None`):
            Weight in the merge, after normalisation; `None` for the base.
        role (`"expert"` or `"base"`):
            An expert is merged; deltas are taken against the base.
        kind (`"full"` or `"adapter"`):
            Whole checkpoint or LoRA adapter.
        metadata (`SourceMetadata`):
            Front matter of its own card (`read_source_metadata`).
        adapter (`CardSource` or `None`):
            Adapter that a full model was read with; all else is about the model.
    """

    spec: str
    repo_id: str | None = None
    commit: str | None = None
    weight: float | None = None
    role: Literal["expert", "base"] = "expert"
    kind: Literal["full", "adapter"] = "full"
    metadata: SourceMetadata = field(default_factory=SourceMetadata)
    adapter: CardSource | None = None

    @property
    def parts(self) -> tuple[CardSource, ...]:
        """The model and the adapter on it, each by itself."""
        return (self,) if self.adapter is None else (replace(self, adapter=None), self.adapter)

    @property
    def is_local(self) -> bool:
        """Whether a reader has to say where it is."""
        return any(part.repo_id is None for part in self.parts)

    @property
    def name(self) -> str:
        """Public name: the Hub id, or the last part of the local path; of a model with an adapter, both."""
        if self.adapter is not None:
            return "+".join(part.name for part in self.parts)
        if self.repo_id is not None:
            return self.repo_id
        last = re.split(r"[\\/]", self.spec.rstrip("\\/"))[-1]
        # A spec such as "." or "~" has no name to show.
        return last if last.strip(".~") else "local folder"

    @property
    def pinned(self) -> str:
        """Name for use in a command: Hub id with commit, or `./` and the last part of the local path."""
        if self.adapter is not None:
            return "+".join(part.pinned for part in self.parts)
        if self.repo_id is None:
            return f"./{self.name}"
        return f"{self.repo_id}@{self.commit}" if self.commit else self.repo_id


@dataclass(frozen=True)
class CardStatistics:
    """Statistics of the merge; `None` where not measured, or where there is nothing to be said."""

    n_tensors_merged: int | None = None
    n_tensors_copied: int | None = None
    n_parameters: int | None = None
    geometry: Geometry | None = None
    losses: str | None = None


@dataclass
class MergeCard:
    """
    Contents of a model card.

    Args:
        model_name (`str`):
            Title of the card.
        output_kind (`"full"` or `"adapter"`):
            Whether the merge wrote a whole checkpoint or a LoRA adapter.
        sources (`list[CardSource]`):
            Experts in order, then the base model if there is one.
        method, space, block, norm (`str`):
            Settings of the merge, as in `MergingArguments`.
        hub_model_id (`str`, *optional*):
            Hub id the model will have; the card's code examples use it.
        task (`Task`, *optional*):
            Task and library of the output (`read_task`).
        non_default_arguments (`dict[str, object]`, *optional*):
            Arguments that differ from their defaults. The card omits secrets and those that do not affect the result.
        command, python (`str`, *optional*):
            Code that reproduces the merge; built from the other fields by default.
        evaluation (`EvaluationRecord`, *optional*):
            Evaluation of the merge.
        figures (`dict[str, str]`, *optional*):
            Name of a figure in `wording.parts.FIGURES` -> its path relative to the card.
        report_file (`str`, *optional*):
            Report page beside the card, with all measurements.
        statistics (`CardStatistics`, *optional*):
            Statistics of the merged weights.
        calibration (`CalibrationRecord`, *optional*):
            How the merge was fitted to its experts on prompts.
        notes (`list[str]`, *optional*):
            Sentences on parts that were dropped or in which sources disagree (tokenizers, configurations).
        versions (`dict[str, str]`, *optional*):
            Library versions that made the merge.
        manifest_files (`list[str]`, *optional*):
            Record files beside the card.
        licence (`str`, *optional*):
            Licence the user chose; by default the rule of `licences.combine` decides.
        tags (`list[str]`, *optional*):
            Further tags.
        tag_names, tool_name, tool_paper, template_file (*optional*):
            Tags, name and paper of the tool, and the Jinja template of the card; subclasses of `FisherRaoMerger` set
            them as class attributes.
    """

    model_name: str
    output_kind: Literal["full", "adapter"]
    sources: list[CardSource]
    method: str = "karcher"
    space: str = "weights"
    block: str = "tensor"
    norm: str = "mean"
    hub_model_id: str | None = None
    task: Task = field(default_factory=Task)
    non_default_arguments: dict[str, object] = field(default_factory=dict)
    command: str | None = None
    python: str | None = None
    evaluation: EvaluationRecord | None = None
    figures: dict[str, str] = field(default_factory=dict)
    report_file: str | None = None
    statistics: CardStatistics = field(default_factory=CardStatistics)
    calibration: CalibrationRecord | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    manifest_files: list[str] = field(
        default_factory=lambda: ["merge_manifest.json", "merge_coefficients.safetensors"]
    )
    licence: str | None = None
    tags: list[str] = field(default_factory=list)
    tag_names: tuple[str, ...] = TAG_NAMES
    tool_name: str = NAME
    tool_paper: Paper | None = FISHER_RAO
    template_file: str = TEMPLATE_FILE

    @property
    def experts(self) -> list[CardSource]:
        """Sources with the role "expert", in the order of the merge."""
        return [source for source in self.sources if source.role == "expert"]

    @property
    def parts(self) -> list[CardSource]:
        """All models and adapters, those on a model each by itself."""
        return [part for source in self.sources for part in source.parts]

    @property
    def is_by_method(self) -> bool:
        """Whether the method decided anything: the mean of a single expert is that expert."""
        return len(self.experts) > 1 or not method_of(self.method).is_directional

    @property
    def base(self) -> CardSource | None:
        """Base model, if there is one."""
        return next((source for source in self.sources if source.role == "base"), None)
