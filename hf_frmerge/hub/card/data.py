"""The plain facts a model card is rendered from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hf_frmerge.evaluation.record import EvaluationRecord
from hf_frmerge.hub.card.licences import SourceMetadata
from hf_frmerge.hub.card.tasks import Task
from hf_frmerge.methods.method import Paper
from hf_frmerge.methods.table import FISHER_RAO
from hf_frmerge.wording.geometry import Geometry

TAG_NAMES = ("merge", "hf-frmerge")
NAME = "Fisher–Rao merging"
TEMPLATE_FILE = str(Path(__file__).with_name("templates") / "model_card.md.jinja")


@dataclass(frozen=True)
class CardSource:
    """
    One model or adapter that went into the merge.

    Args:
        spec (`str`):
            What the person wrote: a Hub id or a local path. A path is shown by its folder name only.
        repo_id (`str` or `None`):
            Hub id, if the source was resolved on the Hub; `None` for a local folder.
        commit (`str` or `None`):
            Commit the Hub id was resolved to.
        weight (`float` or `None`):
            Weight in the merge, after normalisation; `None` for the base.
        role (`"expert"` or `"base"`):
            Whether it was merged, or is what deltas were taken against.
        kind (`"full"` or `"adapter"`):
            Whole checkpoint or LoRA adapter.
        metadata (`SourceMetadata`):
            What its own card says (`read_source_metadata`).
    """

    spec: str
    repo_id: str | None = None
    commit: str | None = None
    weight: float | None = None
    role: Literal["expert", "base"] = "expert"
    kind: Literal["full", "adapter"] = "full"
    metadata: SourceMetadata = field(default_factory=SourceMetadata)

    @property
    def name(self) -> str:
        """Name fit for the public: the Hub id, or the last part of the local path."""
        if self.repo_id is not None:
            return self.repo_id
        last = re.split(r"[\\/]", self.spec.rstrip("\\/"))[-1]
        return last if last.strip(".~") else "local folder"

    @property
    def pinned(self) -> str:
        """How to name this very source in a command: Hub id with commit, or the local folder by its last part."""
        if self.repo_id is None:
            return f"./{self.name}"
        return f"{self.repo_id}@{self.commit}" if self.commit else self.repo_id


@dataclass(frozen=True)
class CardStatistics:
    """What the merge did, in numbers; `None` where it was not measured."""

    n_tensors_merged: int | None = None
    n_tensors_copied: int | None = None
    n_parameters: int | None = None
    geometry: Geometry | None = None


@dataclass
class MergeCard:
    """
    Everything a model card says about one merge.

    Args:
        model_name (`str`):
            Title of the card.
        output_kind (`"full"` or `"adapter"`):
            What was written: a whole checkpoint or a LoRA adapter.
        sources (`list[CardSource]`):
            Experts in order, then the base model if one takes part.
        method, space, block, norm (`str`):
            The merge, in the words of `MergingArguments`.
        hub_model_id (`str`, *optional*):
            Where the model will be; the card's code examples use it.
        task (`Task`, *optional*):
            Task and library of the output (`read_task`).
        non_default_arguments (`dict[str, object]`, *optional*):
            Arguments that differ from their defaults. Secrets and those that do not touch the result are left out.
        command, python (`str`, *optional*):
            How to reproduce the merge; built from the rest where not given.
        evaluation (`EvaluationRecord`, *optional*):
            What was measured.
        figures (`dict[str, str]`, *optional*):
            Figures beside the card: their names in `wording.parts.FIGURES`, and their paths from the card.
        report_file (`str`, *optional*):
            Page with everything that was measured, beside the card.
        statistics (`CardStatistics`, *optional*):
            What the merge did to the weights.
        notes (`list[str]`, *optional*):
            Sentences on what was dropped or in disagreement (tokenizers, configurations).
        versions (`dict[str, str]`, *optional*):
            Library versions that made the merge.
        manifest_files (`list[str]`, *optional*):
            Files of the record beside the card.
        licence (`str`, *optional*):
            Licence the person chose; without it the rule of `licences.combine` decides.
        tags (`list[str]`, *optional*):
            Further tags.
        tag_names, tool_name, tool_paper, template_file (*optional*):
            Tags, name and paper of what made the merge, and the Jinja template of the card: class attributes of
            `FisherRaoMerger`.
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
        """Sources that were merged, in the order of their weights."""
        return [source for source in self.sources if source.role == "expert"]

    @property
    def base(self) -> CardSource | None:
        """Base model, if one takes part."""
        return next((source for source in self.sources if source.role == "base"), None)
