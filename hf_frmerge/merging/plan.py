"""What a merge will do, tensor by tensor: decided from headers alone, before any weight is read."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.adapter import open_adapter
from hf_frmerge.checkpoints.alignment import align
from hf_frmerge.checkpoints.donor import find_disagreements
from hf_frmerge.checkpoints.reader import DTYPE_BITS, FLOAT_DTYPES, open_checkpoint
from hf_frmerge.checkpoints.resolve import resolve_all
from hf_frmerge.checkpoints.writer import STAGING, ShardLayout
from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.merging.arguments import validate_weights
from hf_frmerge.merging.blocks import PIECE_ELEMENTS, block_shape, group_of, head_dim_of
from hf_frmerge.merging.operands import DoraTensor, StoredTensor, TensorInputs
from hf_frmerge.merging.weight_rules import WeightSchedule, layer_index
from hf_frmerge.methods.span import SpanOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.checkpoints.adapter import Adapter
    from hf_frmerge.checkpoints.reader import Checkpoint
    from hf_frmerge.checkpoints.resolve import Source
    from hf_frmerge.merging.arguments import MergingArguments
    from hf_frmerge.merging.operands import DenseTensor

DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class Expert:
    """One model to merge: a full checkpoint, or a low-rank adapter of the base model."""

    source: Source
    checkpoint: Checkpoint | None = None
    adapter: Adapter | None = None

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
        """Its tensors on disk: the model's, or the adapter's."""
        if self.checkpoint is not None:
            return self.checkpoint
        assert self.adapter is not None
        return self.adapter.checkpoint

    def dense_tensor(self, step: TensorStep, base: StoredTensor | None) -> DenseTensor | None:
        """Return the expert's full tensor where it has one; an adapter has one for saved and DoRA modules."""
        if self.checkpoint is not None:
            return StoredTensor(self.checkpoint, self.checkpoint.tensors[step.name])
        assert self.adapter is not None and base is not None
        if step.name in self.adapter.dense:
            return StoredTensor(self.adapter.checkpoint, self.adapter.dense[step.name])
        delta = self.adapter.deltas.get(step.name)
        return DoraTensor(base, delta.dora_weight(), step.cols) if delta and delta.is_dora else None


@dataclass(frozen=True)
class TensorStep:
    """
    One tensor of the output.

    Attributes:
        dtype: dtype code of the output (`"BF16"`, ...).
        action: `"merge"`, or `"copy"` from the model with index `donor` (-1 is the base).
        weights: one per expert, summing to 1; empty for a copy.
        group: tensors of one group lie on one sphere and get the same coefficients.
        n_blocks, block_len: how the tensor is cut into blocks, in elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: str
    donor: int
    weights: tuple[float, ...]
    group: str
    n_blocks: int
    block_len: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        """Elements of a row."""
        return self.numel // self.shape[0] if self.shape and self.numel else 1

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * DTYPE_BITS[self.dtype] // 8


@dataclass
class MergePlan:
    """Everything the engine needs, checked."""

    args: MergingArguments
    experts: list[Expert]
    base: Expert | None
    weights: list[float]
    space: str
    steps: list[TensorStep]
    layout: ShardLayout
    notes: list[str] = field(default_factory=list)

    @property
    def donor(self) -> Expert:
        """Model whose config and tokenizer the output gets: the base, else the first full expert."""
        return self.base or next(expert for expert in self.experts if expert.checkpoint)

    @property
    def models(self) -> list[Expert]:
        """The experts, then the base if there is one."""
        return [*self.experts, *([self.base] if self.base else [])]

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

    def copied(self, step: TensorStep) -> TensorStep:
        """Return a step that copies the tensor from the base, or the first full expert, instead of merging it."""
        donor = -1 if self.base else self.experts.index(self.donor)
        return replace(step, action="copy", donor=donor, weights=())

    def inputs(self, step: TensorStep) -> TensorInputs:
        """Return what has to be read for a step."""
        labels = {index: f"expert {expert.spec!r}" for index, expert in enumerate(self.experts)}
        if self.base is not None:
            labels[-1] = f"base model {self.base.spec!r}"
        if step.action == "copy":
            donor = self.base if step.donor < 0 else self.experts[step.donor]
            assert donor is not None and donor.checkpoint is not None
            only = StoredTensor(donor.checkpoint, donor.checkpoint.tensors[step.name])
            return TensorInputs(step.name, 1, 1, None, {0: only}, {}, {0: labels[step.donor]})
        base = None
        if self.base is not None and (self.space == "deltas" or any(expert.adapter for expert in self.experts)):
            assert self.base.checkpoint is not None
            base = StoredTensor(self.base.checkpoint, self.base.checkpoint.tensors[step.name])
        dense: dict[int, DenseTensor] = {}
        low_rank = {}
        for index, expert in enumerate(self.experts):
            weights = expert.dense_tensor(step, base)
            if weights is not None:
                dense[index] = weights
            elif expert.adapter is not None and step.name in expert.adapter.deltas:
                low_rank[index] = expert.adapter.deltas[step.name]
        return TensorInputs(step.name, step.cols, len(self.experts), base, dense, low_rank, labels)

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
            "shards": [shard.file for shard in self.layout.shards],
            "disk_free": shutil.disk_usage(_existing(Path(self.args.output_dir))).free,
            "memory_estimate": self.piece_memory,
            "notes": self.notes,
        }

    @property
    def piece_memory(self) -> int:
        """Most bytes one worker holds at a time, whatever the size of the model."""
        # Output piece, one float32 row buffer per low-rank expert, and a copy of each input where it is remote.
        copies = 1 + sum(1 for e in self.experts if e.adapter) + len(self.experts) + (self.base is not None)
        return copies * PIECE_ELEMENTS * 4

    def close(self) -> None:
        """Close all files."""
        for model in self.models:
            model.weights.close()


def build_plan(
    experts: Sequence[str],
    args: MergingArguments,
    weights: Sequence[float] | None = None,
    base_model: str | None = None,
) -> MergePlan:
    """
    Resolve, open and align the models and decide what happens to every tensor. Reads headers only.

    Args:
        experts: Two or more folders or Hub ids, full checkpoints or adapters.
        args: Options.
        weights: One non-negative number per expert; all alike by default.
        base_model: Folder or Hub id of the base model; needed for deltas and adapters.

    Raises:
        ArgumentError: If options contradict each other or the models.
        CheckpointError: If a model is missing, broken, or does not fit the others.
    """
    if len(experts) < 2:
        raise ArgumentError(f"A merge needs at least two experts, got {len(experts)}. Name two or more models.")
    alphas = validate_weights(weights, len(experts))
    sources = resolve_all([*experts, *([base_model] if base_model else [])], token=args.hub_token)
    check_output_dir(args, [source.path for source in sources])
    opened = [_open(source) for source in sources]
    base = opened.pop() if base_model else None
    space = _space(args, opened, base)
    opened = [_match_adapter(expert, base) for expert in opened]
    steps, notes = _steps(args, opened, base, alphas, space)
    if args.method == "slerp" and len(opened) != 2:
        raise ArgumentError(
            f"slerp joins exactly two experts, got {len(opened)}. Use method='karcher', its extension."
        )
    layout = ShardLayout.plan([(step.name, step.dtype, step.shape) for step in steps], args.max_shard_bytes)
    notes += find_disagreements([model.source for model in ([base] if base else []) + opened])
    return MergePlan(args, opened, base, alphas, space, steps, layout, notes)


def check_output_dir(args: MergingArguments, inputs: Sequence[str]) -> None:
    """
    Refuse an output folder that is an input, or not empty.

    Raises:
        ArgumentError: With the option that would allow it.
    """
    output = Path(args.output_dir)
    for path in inputs:
        if "://" not in path and output.resolve() == Path(path).resolve():
            raise ArgumentError(f"The output folder {args.output_dir!r} is also an input. Choose another output_dir.")
    if not output.exists() or args.overwrite or args.resume_from_checkpoint:
        return
    if not output.is_dir():
        raise ArgumentError(f"The output folder {args.output_dir!r} is a file. Choose another output_dir.")
    if (output / STAGING).exists():
        raise ArgumentError(
            f"{args.output_dir!r} holds an interrupted merge. Pass --resume (resume_from_checkpoint=True) to go on "
            "with it, or --overwrite to start anew."
        )
    if any(output.iterdir()):
        raise ArgumentError(
            f"The output folder {args.output_dir!r} is not empty. Choose another, or pass --overwrite "
            "(overwrite=True) to replace the model in it."
        )


def _open(source: Source) -> Expert:
    if source.kind == "adapter":
        return Expert(source, adapter=open_adapter(source))
    return Expert(source, checkpoint=open_checkpoint(source))


def _match_adapter(expert: Expert, base: Expert | None) -> Expert:
    """Bind an adapter to the tensors of the base."""
    if expert.adapter is None or base is None or base.checkpoint is None:
        return expert
    shapes = {name: info.shape for name, info in base.checkpoint.tensors.items()}
    tied = bool(base.checkpoint.config().get("tie_word_embeddings"))
    adapter = expert.adapter.match(shapes, tied_embeddings=tied)
    adapter.check_base_layers(base.checkpoint)
    return Expert(expert.source, adapter=adapter)


def _space(args: MergingArguments, experts: list[Expert], base: Expert | None) -> str:
    adapters = [expert for expert in experts if expert.adapter]
    if base is not None and base.checkpoint is None:
        raise ArgumentError(f"The base model {base.spec!r} is an adapter; a full checkpoint is needed.")
    if adapters and base is None:
        raise ArgumentError(
            f"{adapters[0].spec!r} is an adapter: pass the model it was trained from as base_model "
            f"(its config names {adapters[0].adapter.config.base_model!r})."  # type: ignore[union-attr]
        )
    space = args.space or ("deltas" if adapters or args.method == "task_arithmetic" else "weights")
    if args.method == "task_arithmetic" and space != "deltas":
        raise ArgumentError('task_arithmetic adds deltas: it needs space="deltas" and a base_model.')
    if space == "deltas" and base is None:
        raise ArgumentError('space="deltas" needs base_model: deltas are the differences to it.')
    return space


def _steps(
    args: MergingArguments, experts: list[Expert], base: Expert | None, weights: list[float], space: str
) -> tuple[list[TensorStep], list[str]]:
    full = [index for index, expert in enumerate(experts) if expert.checkpoint]
    checkpoints = [experts[index].checkpoint for index in full]
    aligned = align([c for c in checkpoints if c], base.checkpoint if base else None)
    notes = list(aligned.notes)
    touched = {name for e in experts if e.adapter for name in (*e.adapter.deltas, *e.adapter.dense)}
    names = [tensor.name for tensor in aligned.tensors]
    schedule = WeightSchedule.parse(args.weight_rules or [], weights, len(experts))
    notes += [f"Weight rule {rule!r} matches no tensor." for rule in schedule.unused_rules(names)]
    n_layers = 1 + max((index for name in names if (index := layer_index(name)) is not None), default=0)
    head_dim = None
    if args.block == "head":
        donor = base or experts[full[0]]
        head_dim = head_dim_of(donor.checkpoint.config() if donor.checkpoint else {})

    steps = []
    for tensor in aligned.tensors:
        is_float = tensor.dtype in FLOAT_DTYPES
        merge = tensor.action == "merge" and (bool(full) or tensor.name in touched)
        n_blocks, block_len = block_shape(tensor.name, tensor.shape, args.block if merge else "tensor", head_dim)
        steps.append(
            TensorStep(
                name=tensor.name,
                dtype=DTYPE_CODES.get(args.dtype, tensor.dtype) if is_float else tensor.dtype,
                shape=tensor.shape,
                action="merge" if merge else "copy",
                donor=-1 if tensor.donor < 0 else full[tensor.donor],
                weights=tuple(schedule.weights_for(tensor.name, n_layers)) if merge else (),
                group=group_of(tensor.name, args.block),
                n_blocks=n_blocks,
                block_len=block_len,
            )
        )
    _check_groups(steps)
    return steps, notes


def _check_groups(steps: list[TensorStep]) -> None:
    """One sphere, one set of weights."""
    first: dict[str, TensorStep] = {}
    for step in steps:
        other = first.setdefault(step.group, step) if step.action == "merge" else step
        if other.weights != step.weights:
            raise ArgumentError(
                f"weight_rules give {other.name!r} and {step.name!r} different weights, but both lie on one sphere "
                f"(group {step.group or 'model'!r}). Use block='tensor', or rules that do not divide a group."
            )


def _identity(expert: Expert) -> dict[str, Any]:
    source = expert.source
    return {
        "spec": source.spec,
        "kind": source.kind,
        "path": source.path,
        "commit": source.commit,
        "bytes": expert.nbytes,
        "n_tensors": len(expert.weights.tensors),
    }


def _existing(path: Path) -> Path:
    """Return the closest folder above `path` that exists."""
    path = path.resolve()
    while not path.exists():
        if path.parent == path:
            raise MergeError(f"No folder above {path} exists.")
        path = path.parent
    return path
