"""Open PEFT LoRA adapters: which modules they change, checked against their configuration and a base model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_frmerge.checkpoints.adapter_config import AdapterConfig, read_adapter_config
from hf_frmerge.checkpoints.adapter_match import find_targets
from hf_frmerge.checkpoints.factors import LowRankDelta
from hf_frmerge.checkpoints.floats import narrow, widen
from hf_frmerge.checkpoints.reader import Checkpoint, TensorInfo, open_checkpoint, some
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.errors import CheckpointError

PEFT_PREFIX = "base_model.model."

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<slot>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)
_COMPARE_ELEMENTS = 1 << 22  # per step when a stored copy of the base is compared with the base


@dataclass(frozen=True)
class Adapter:
    """
    A LoRA adapter whose headers were read and checked; factors are read module by module.

    Attributes:
        checkpoint: its tensors; `checkpoint.source` says where they came from.
        config: its `adapter_config.json`.
        deltas: target tensor -> low-rank delta.
        dense: target tensor -> full tensor that replaces the base's (`modules_to_save`).
        base_layers: target tensor -> copy of the base's own tensor, which PEFT stores beside embedding factors.
    """

    checkpoint: Checkpoint
    config: AdapterConfig
    deltas: dict[str, LowRankDelta]
    dense: dict[str, TensorInfo]
    base_layers: dict[str, TensorInfo]

    @property
    def source(self) -> Source:
        """Where the adapter came from."""
        return self.checkpoint.source

    @property
    def spec(self) -> str:
        """What the user calls this adapter."""
        return self.checkpoint.source.spec

    @property
    def uses_dora(self) -> bool:
        """Whether any module is a DoRA module."""
        return any(delta.is_dora for delta in self.deltas.values())

    def match(self, shapes: Mapping[str, Sequence[int]], *, tied_embeddings: bool = False) -> Adapter:
        """
        Return the same adapter with its modules mapped to tensors of a base checkpoint.

        Module paths are those of the model in memory; the checkpoint may have another prefix (`"model."` more or
        less). Whether a two-dimensional weight is stored transposed is read off the base's shape where it is not
        square: PEFT's `fan_in_fan_out` is one flag for all modules.

        Args:
            shapes (`Mapping[str, Sequence[int]]`):
                Shape of every tensor of the base checkpoint.
            tied_embeddings (`bool`, *optional*, defaults to `False`):
                Whether the base model ties its output layer to its input embedding.

        Raises:
            CheckpointError: If a module has no tensor, several, or one of another shape, or is a tied embedding.
        """
        targets = find_targets(self.spec, [*self.deltas, *self.dense, *self.base_layers], shapes)
        if tied_embeddings:
            self._refuse_tied()
        for name, info in (self.dense | self.base_layers).items():
            self._check_shape(name, info.shape, targets[name], shapes[targets[name]])
        return replace(
            self,
            deltas={targets[name]: delta for name, delta in self._orient(targets, shapes).items()},
            dense={targets[name]: info for name, info in self.dense.items()},
            base_layers={targets[name]: info for name, info in self.base_layers.items()},
        )

    def check_base_layers(self, base: Checkpoint) -> None:
        """
        Compare the stored copies of base tensors with the base itself (call it on a matched adapter).

        Raises:
            CheckpointError: If a copy differs: the adapter was trained on another base.
        """
        for target, info in self.base_layers.items():
            theirs = base.tensors[target]
            size, their_size = info.nbytes // info.numel, theirs.nbytes // theirs.numel
            for start in range(0, info.numel, _COMPARE_ELEMENTS):
                stop = min(start + _COMPARE_ELEMENTS, info.numel)
                copy = self.checkpoint.read(info.name, start * size, stop * size)
                original = base.read(target, start * their_size, stop * their_size)
                if not np.array_equal(narrow(widen(original, theirs.dtype), info.dtype), copy):
                    raise CheckpointError(
                        f"Adapter {self.spec!r} carries a copy of {target!r} that differs from the one in "
                        f"{base.source.spec!r}: it was trained on another base, or the base's embedding was changed. "
                        "Pass the base it was trained on."
                    )

    def _orient(self, targets: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> dict[str, LowRankDelta]:
        oriented = {}
        evidence = set()
        for name, delta in self.deltas.items():
            found = tuple(shapes[targets[name]])
            flipped = delta.kind == "linear" and found == delta.shape[::-1] != delta.shape
            if not flipped:
                self._check_shape(name, delta.shape, targets[name], found)
            transposed = delta.transposed != flipped
            if delta.kind == "linear" and found != found[::-1]:
                evidence.add(transposed)
            oriented[name] = replace(delta, target=targets[name], shape=found, transposed=transposed)
        square = [name for name, delta in oriented.items() if delta.kind == "linear" and len(set(delta.shape)) == 1]
        if len(evidence) > 1 and square:
            raise CheckpointError(
                f"Adapter {self.spec!r} mixes modules stored as (in, out) with modules stored as (out, in), and "
                f"module {self.deltas[square[0]].module!r} is square, so its orientation cannot be told. Merge it "
                "into its base with PEFT's `merge_and_unload` and merge the full checkpoints."
            )
        for transposed in evidence:
            for name in square:
                oriented[name] = replace(oriented[name], transposed=transposed)
        for delta in oriented.values():
            _refuse_unsupported_dora(self.spec, delta)
        return oriented

    def _check_shape(self, name: str, expected: Sequence[int], target: str, found: Sequence[int]) -> None:
        if tuple(expected) != tuple(found):
            raise CheckpointError(
                f"Adapter {self.spec!r}: {name!r} changes a weight of shape {tuple(expected)}, but {target!r} of the "
                f"base has shape {tuple(found)}. It belongs to another base, or its vocabulary was resized."
            )

    def _refuse_tied(self) -> None:
        tied = [d.module for d in self.deltas.values() if d.kind == "embedding" or d.module.endswith("lm_head")]
        tied += [name for name in self.dense if re.search(r"(^|\.)(lm_head|embed_tokens|wte|word_embeddings)\.", name)]
        if tied:
            raise CheckpointError(
                f"Adapter {self.spec!r} changes {some(tied)}, but the base ties its input embedding and its output "
                "layer, so one change would act on both. Merge into an adapter instead, or untie the base's weights."
            )


def open_adapter(source: Source) -> Adapter:
    """
    Open a LoRA adapter, checking its configuration and the shape of every factor; contents are not read yet.

    Args:
        source (`Source`):
            What `resolve` returned, of kind `"adapter"`.

    Returns:
        `Adapter`: deltas by target tensor (`module + ".weight"`; see `Adapter.match`).

    Raises:
        CheckpointError: If files are missing or broken, factors do not fit together, or the adapter is of a kind that
            is not a plain LoRA or DoRA; the message names the field or the tensor.
    """
    checkpoint = open_checkpoint(source)
    config = read_adapter_config(checkpoint.folder, source.spec)
    parts: dict[str, dict[str, TensorInfo]] = {}
    dense: dict[str, TensorInfo] = {}
    base_layers: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if not info.is_float:
            raise CheckpointError(
                f"Adapter {source.spec!r}: tensor {name!r} has dtype {info.dtype}; bf16, fp16, fp32 or fp64 expected."
            )
        stem = name.removeprefix(PEFT_PREFIX)
        factor = _FACTOR.fullmatch(stem)
        if factor:
            parts.setdefault(factor["module"], {})[factor["slot"]] = info
        elif stem.endswith(".base_layer.weight"):
            base_layers[stem.removesuffix(".base_layer.weight") + ".weight"] = info
        elif "lora_" in stem or ".base_layer." in stem or "trainable_tokens" in stem:
            raise CheckpointError(
                f"Adapter {source.spec!r}: tensor {name!r} is not a factor of a plain LoRA adapter (lora_A.weight, "
                "lora_B.weight, lora_embedding_A, lora_embedding_B). Save it again with PEFT's `save_pretrained`."
            )
        else:
            dense[stem] = info
    deltas = [_build_delta(checkpoint, config, module, slots) for module, slots in parts.items()]
    return Adapter(checkpoint, config, {delta.target: delta for delta in deltas}, dense, base_layers)


def common_base(adapters: Sequence[Adapter]) -> tuple[str | None, str | None]:
    """
    Return the name and revision of the base model that all adapters were trained on.

    Two different names that are local paths are taken as one base if their last parts agree (the same folder, seen
    from two machines); Hub ids must be equal. An adapter that names no base agrees with any.

    Raises:
        CheckpointError: If two adapters name different bases or revisions.
    """
    named = [adapter for adapter in adapters if adapter.config.base_model]
    if not named:
        return None, None
    first = named[0]
    for other in named[1:]:
        if not _same_base(str(first.config.base_model), str(other.config.base_model)):
            raise CheckpointError(
                f"Adapters {first.spec!r} and {other.spec!r} were trained on different base models: "
                f"{first.config.base_model!r} and {other.config.base_model!r}. Deltas of different bases cannot be "
                "merged; if both names mean the same weights, correct base_model_name_or_path in adapter_config.json."
            )
        mine, theirs = first.config.revision or "main", other.config.revision or "main"
        if mine != theirs:
            raise CheckpointError(
                f"Adapters {first.spec!r} and {other.spec!r} were trained on different revisions of "
                f"{first.config.base_model!r}: {mine!r} and {theirs!r}. If the weights are the same, correct revision "
                "in adapter_config.json."
            )
    return first.config.base_model, first.config.revision


def _same_base(first: str, second: str) -> bool:
    if first == second:
        return True
    parts = [re.split(r"[/\\]+", name.rstrip("/\\")) for name in (first, second)]
    is_local = [len(part) != 2 or part[0] in ("", ".", "..", "~") or part[0].endswith(":") for part in parts]
    return any(is_local) and parts[0][-1] == parts[1][-1]


def _build_delta(
    checkpoint: Checkpoint, config: AdapterConfig, module: str, slots: dict[str, TensorInfo]
) -> LowRankDelta:
    spec = checkpoint.source.spec
    embedding = "lora_embedding_A" in slots or "lora_embedding_B" in slots
    prefix = "lora_embedding_" if embedding else "lora_"
    missing = [prefix + side for side in "AB" if prefix + side not in slots]
    if missing:
        raise CheckpointError(
            f"Adapter {spec!r}, module {module!r}: {missing[0]} is missing from its weights. A factor alone means "
            "nothing; save the adapter again."
        )
    down, up = slots[prefix + "A"], slots[prefix + "B"]
    rank = config.rank(module)
    conv = len(down.shape) > 2
    if len(down.shape) < 2 or len(up.shape) != len(down.shape) or math.prod(up.shape[2:]) != 1:
        raise CheckpointError(
            f"Adapter {spec!r}, module {module!r}: factors of shapes {down.shape} and {up.shape} do not make a matrix "
            "product. Empty or flat factors come from a sharded run that was saved without gathering its weights."
        )
    if down.shape[0] != rank or up.shape[1] != rank:
        grouped = " Grouped convolutions are not supported." if conv and down.shape[0] == rank else ""
        raise CheckpointError(
            f"Adapter {spec!r}, module {module!r}: its configuration says rank {rank}, its factors have shapes "
            f"{down.shape} and {up.shape}. The configuration belongs to other weights.{grouped}"
        )
    transposed = embedding or (config.fan_in_fan_out and not conv)
    shape = (down.shape[1], up.shape[0]) if transposed else (up.shape[0], *down.shape[1:])
    delta = LowRankDelta(
        checkpoint=checkpoint,
        module=module,
        target=module + ".weight",
        kind="embedding" if embedding else "conv" if conv else "linear",
        rank=rank,
        scale=config.scale(module),
        shape=shape,
        transposed=transposed,
        down=down,
        up=up,
        magnitude=slots.get("lora_magnitude_vector"),
    )
    if config.use_dora != delta.is_dora:
        raise CheckpointError(
            f"Adapter {spec!r}, module {module!r}: use_dora is {config.use_dora} but its magnitude vector is "
            f"{'there' if delta.is_dora else 'missing'}. The configuration belongs to other weights."
        )
    return delta


def _refuse_unsupported_dora(spec: str, delta: LowRankDelta) -> None:
    if delta.is_dora and (delta.kind != "linear" or delta.transposed):
        raise CheckpointError(
            f"Adapter {spec!r}, module {delta.module!r}: use_dora is supported for linear layers stored as "
            f"(out, in), not for this one ({delta.kind}, shape {delta.shape}). Merge it into its base with PEFT's "
            "`merge_and_unload` and merge the full checkpoints."
        )
