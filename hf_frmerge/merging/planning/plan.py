"""Plan of a merge: its models, and what happens to every tensor."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_frmerge.checkpoints.tensors.reader import ADAPTER_FILE, FLOAT_DTYPES
from hf_frmerge.errors import MergeError
from hf_frmerge.merging.arguments.values import as_shares
from hf_frmerge.merging.planning.blocks import PIECE_ELEMENTS
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE, cut_as_fitted, read_coefficients
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE, read_corrections
from hf_frmerge.methods.post_steps import SingularValueCalibration
from hf_frmerge.methods.span import SpanOptions
from hf_frmerge.methods.spectral.decision import memory_bytes
from hf_frmerge.methods.spectral.inputs import SpectralOptions
from hf_frmerge.methods.table import METHODS
from hf_frmerge.visible import without_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_frmerge.checkpoints.adapters.adapter import Adapter
    from hf_frmerge.checkpoints.adapters.folded import FoldedAdapter
    from hf_frmerge.checkpoints.beside.look_beside import CarriedFile
    from hf_frmerge.checkpoints.resolve import Source
    from hf_frmerge.checkpoints.tensors.layout import ShardLayout
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.planning.coefficient_table import CoefficientTable
    from hf_frmerge.merging.planning.corrections import CalibrationRecord, Corrections
    from hf_frmerge.merging.planning.tensor_step import TensorStep
    from hf_frmerge.merging.planning.vocabulary.record import VocabularyRecord
    from hf_frmerge.methods.sparse.rules import SparseOptions


@dataclass(frozen=True)
class Expert:
    """
    Opened model of a merge (an expert or the base): a full checkpoint, or a low-rank adapter of the base.

    Attributes:
        source: where it is.
        checkpoint: full model. That of an adapter which has no low-rank factors is its base, read with the adapter.
        adapter: low-rank adapter of the base.
        folded: adapter that the full model is read with.
    """

    source: Source
    checkpoint: Checkpoint | None = None
    adapter: Adapter | None = None
    folded: FoldedAdapter | None = None

    @property
    def spec(self) -> str:
        """The expert as the user wrote it."""
        return self.source.spec

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.weights.total_bytes

    @property
    def weights(self) -> Checkpoint:
        """Open checkpoint or adapter weights."""
        if self.checkpoint is not None:
            return self.checkpoint
        assert self.adapter is not None
        return self.adapter.checkpoint

    @property
    def recorded(self) -> list[tuple[Source, Checkpoint]]:
        """Its folder and that of an adapter on it, with the weights that lie there; a base is recorded by itself."""
        if self.folded is None or self.checkpoint is None:
            return [(self.source, self.weights)]
        if self.source.adapter is None:
            return [(self.source, self.folded.checkpoint)]
        model, adapter = self.source.parts
        return [(model, self.checkpoint), (adapter, self.folded.checkpoint)]

    @property
    def opened(self) -> list[Checkpoint]:
        """All that is open: its weights, and the adapter they are read with."""
        return [self.weights, *([self.folded.checkpoint] if self.folded is not None else [])]


@dataclass
class MergePlan:
    """
    Checked plan of a merge.

    Attributes:
        space: `"weights"` or `"deltas"`: what the points are.
        steps: one step for each tensor of the output; for an adapter, one for each module.
        layout: place of the tensors in the shards of a full model; `None` if the output is an adapter.
        notes: what the user should know.
        carried: files beside weights and config that the output takes from the models.
        coefficients: table that takes the place of a method.
        calibration: how the merge was fitted to its experts on prompts, if it was.
        corrections: what that adds to the method's tensors; `None` if it found nothing better, or coefficients.
        fitted: coefficients that it found, in the place of the method's for some tensors.
        config_changes: entries of the output's `config.json` that differ from those of the donor.
        left_out: tensor that the output does not have -> reason.
        vocabulary: what was made of the vocabularies; `None` if all models have the same.
        generated: name -> text of a file of the output that no model has.
        read_beside: files that these and the rows of tokens were made from.
        chooses_method: whether the method was left to choose: prompts may choose another than the one here.
    """

    args: MergingArguments
    experts: list[Expert]
    base: Expert | None
    weights: list[float]
    space: str
    steps: list[TensorStep]
    layout: ShardLayout | None
    notes: list[str] = field(default_factory=list)
    carried: tuple[CarriedFile, ...] = ()
    coefficients: CoefficientTable | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    calibration: CalibrationRecord | None = None
    corrections: Corrections | None = None
    fitted: CoefficientTable | None = None
    vocabulary: VocabularyRecord | None = None
    generated: Mapping[str, str] = field(default_factory=dict)
    read_beside: tuple[CarriedFile, ...] = ()
    chooses_method: bool = False

    @property
    def output_kind(self) -> Literal["full", "adapter"]:
        """`"full"` or `"adapter"`."""
        return "full" if self.layout else "adapter"

    @property
    def donor(self) -> Expert:
        """Model whose config and tokenizer the output gets: the base, else the first full expert."""
        return self.base or next(expert for expert in self.experts if expert.checkpoint)

    @property
    def models(self) -> list[Expert]:
        """The experts, then the base if there is one."""
        return [*self.experts, *([self.base] if self.base else [])]

    @cached_property
    def labels(self) -> dict[int, str]:
        """Names of the experts, by index, and of the base (-1), for messages."""
        labels = {index: f"expert {expert.spec!r}" for index, expert in enumerate(self.experts)}
        return labels | ({-1: f"base model {self.base.spec!r}"} if self.base is not None else {})

    @property
    def input_paths(self) -> list[str]:
        """Folders of the models, and of the adapters on them."""
        return [part.path for model in self.models for part in model.source.parts]

    @property
    def opened(self) -> list[Checkpoint]:
        """All checkpoints that are read."""
        return [checkpoint for model in self.models for checkpoint in model.opened]

    @property
    def span_options(self) -> SpanOptions:
        """Options of the method."""
        args = self.args
        return SpanOptions(
            norm=args.norm,  # type: ignore[arg-type]  # validated against the same choices
            beta=args.beta,
            scale=args.scale,
            tol=args.tol,
            max_iter=args.max_iter,
            on_ambiguous=args.on_ambiguous,  # type: ignore[arg-type]
        )

    def sparse_options(self, weights: tuple[float, ...]) -> SparseOptions:
        """Options of a sparse method, for a group with these weights."""
        from hf_frmerge.methods.sparse.rules import SparseOptions  # on use: other methods have no use for the rules

        args = self.args
        return SparseOptions(
            weights,
            scale=args.scale,
            density=1.0 if args.density is None else args.density,
            gamma=args.gamma,
            epsilon=args.epsilon,
            agreement=args.agreement,
            min_change=args.min_change,
            seed=args.seed,
        )

    @property
    def spectral_options(self) -> SpectralOptions:
        """Options of a spectral method."""
        density = 1.0 if self.args.density is None else self.args.density
        return SpectralOptions(density, self.args.descent_steps)

    def post_step(self, step: TensorStep) -> SingularValueCalibration | None:
        """Return what is done to a tensor after it was merged."""
        if self.args.post_step is None or not step.is_matrix:
            return None
        return SingularValueCalibration(tuple(as_shares(step.weights)), self.args.svc_floor)

    def copied(self, step: TensorStep) -> TensorStep:
        """Return a step that copies the tensor from the base, or the first full expert, instead of merging it."""
        donor = -1 if self.base else self.experts.index(self.donor)
        return replace(step, action="copy", donor=donor, weights=(), is_matrix=False)

    def describe(self) -> dict[str, Any]:
        """Return a summary that can be written as JSON: what will be merged and copied, sizes, disk and memory."""
        merged = [step for step in self.steps if step.action == "merge"]
        return {
            "method": self.args.method,
            "space": self.space,
            "block": self.args.block,
            "dtype": self.args.dtype,
            "experts": [{**_identity(expert), "weight": weight} for expert, weight in zip(self.experts, self.weights)],
            "base": _identity(self.base) if self.base else None,
            "n_merge": len(merged),
            "n_copy": len(self.steps) - len(merged),
            "n_parameters": sum(step.numel for step in self.steps if step.dtype in FLOAT_DTYPES),
            "input_bytes": sum(model.nbytes for model in self.models),
            "output_bytes": sum(step.nbytes for step in self.steps),
            "output_kind": self.output_kind,
            "shards": [shard.file for shard in self.layout.shards] if self.layout else [ADAPTER_FILE],
            "disk_free": shutil.disk_usage(_existing(Path(self.args.output_dir))).free,
            "memory_estimate": self.piece_memory,
            "vocabulary": self.vocabulary.to_dict() if self.vocabulary is not None else None,
            "notes": self.notes,
        }

    @property
    def piece_memory(self) -> int:
        """Upper limit of the bytes one worker holds at a time; it depends on matrices and quantised weights."""
        # The output piece, one float32 buffer of rows for each adapter, and a copy of each input if it is remote.
        copies = 1 + sum(1 for e in self.experts if e.adapter) + len(self.experts) + (self.base is not None)
        if METHODS[self.args.method].kind == "sparse":
            copies += 4  # the merged piece in float64, in parts and joined
        if self.vocabulary is not None:
            copies += 8  # rows of one input that are filled in, those they are made of, and both as read, in float64
        whole = max((model.weights.largest_computed for model in self.models), default=0)
        return whole + max(copies * PIECE_ELEMENTS * 4, max(map(self.matrix_memory, self.steps), default=0))

    def matrix_memory(self, step: TensorStep) -> int:
        """Upper limit of the bytes that merging a tensor as a matrix takes; 0 if it is not."""
        if not step.is_matrix:
            return 0
        rank = self._core_rank(step)
        return memory_bytes(self.args.method, step.shape[0], step.cols, len(self.experts), core_rank=rank)

    def _core_rank(self, step: TensorStep) -> int | None:
        """Return the sum of the ranks of the experts' deltas, if these are merged as cores."""
        method = METHODS[self.args.method]
        if method.cores is None or self.args.post_step is not None:
            return None
        rank = 0
        for expert in self.experts:
            if expert.adapter is None or expert.adapter.is_whole(step.name):
                return None
            delta = expert.adapter.deltas.get(step.name)
            rank += delta.rank if delta is not None else 0
        is_small = 0 < rank < min(step.shape[0], step.cols)
        return rank if is_small or method.needs_factors or self.layout is None else None

    def take_fit(self, folder: Path) -> None:
        """
        Take what a fit wrote into a folder: coefficients, corrections, or nothing.

        Raises:
            MergeError: If a file is damaged.
        """
        if (folder / CORRECTIONS_FILE).exists():
            self.corrections = read_corrections(str(folder))
        if (folder / COEFFICIENTS_FILE).exists():
            self.take_coefficients(read_coefficients(folder))

    def take_coefficients(self, table: CoefficientTable) -> None:
        """
        Take the coefficients that a fit found for some of the tensors.

        Raises:
            ArgumentError: If they do not fit a tensor or the experts.
        """
        self.fitted = table
        self.steps = cut_as_fitted(self.steps, table, len(self.experts))

    def close(self) -> None:
        """Close all files."""
        for checkpoint in self.opened:
            checkpoint.close()
        if self.corrections is not None:
            self.corrections.checkpoint.close()


def _identity(expert: Expert) -> dict[str, Any]:
    source = expert.source
    return {
        "spec": source.spec,
        "kind": source.kind,
        "path": without_secrets(source.path),
        "commit": source.commit,
        "bytes": expert.nbytes,
        "n_tensors": len(expert.weights.stored),
    }


def _existing(path: Path) -> Path:
    """Return the closest folder above `path` that exists."""
    path = path.resolve()
    while not path.exists():
        if path.parent == path:
            raise MergeError(f"No folder above {path} exists.")
        path = path.parent
    return path
