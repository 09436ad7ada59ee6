"""Open PEFT LoRA adapters, and check their modules against their configuration and against a base model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hf_frmerge.checkpoints.adapters.base_copies import PEFT_PREFIX, check_base_copy, copied_from_base
from hf_frmerge.checkpoints.adapters.config import AdapterConfig, read_adapter_config
from hf_frmerge.checkpoints.adapters.factors import LowRankDelta
from hf_frmerge.checkpoints.adapters.match import find_targets
from hf_frmerge.checkpoints.model_structure import UNKNOWN, ModelStructure, leaf, may_be_conv1d, may_be_tied
from hf_frmerge.checkpoints.names.model_names import ModelNames
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo, open_checkpoint, some
from hf_frmerge.errors import CheckpointError

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<slot>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
)


@dataclass(frozen=True)
class Adapter:
    """
    LoRA adapter with checked headers; factors are read module by module.

    Attributes:
        checkpoint: its tensors; `checkpoint.source` is their location.
        config: its `adapter_config.json`.
        deltas: target tensor -> low-rank delta.
        dense: target tensor -> full tensor that replaces the base's (`modules_to_save`).
        base_layers: target tensor -> copy of the base tensor, which PEFT stores beside factors of an embedding or of
            an output layer, with its bias.
        new_tensors: those of `dense` that the base does not have: a head of its own. Known once it is matched.
        set_apart: stored name of every tensor that is in none of these, at the user's request -> its target.
    """

    checkpoint: Checkpoint
    config: AdapterConfig
    deltas: dict[str, LowRankDelta]
    dense: dict[str, TensorInfo]
    base_layers: dict[str, TensorInfo]
    new_tensors: frozenset[str] = frozenset()
    set_apart: Mapping[str, str] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """Where the adapter came from."""
        return self.checkpoint.source

    @property
    def spec(self) -> str:
        """Name of the adapter as the user wrote it."""
        return self.checkpoint.source.spec

    @property
    def uses_dora(self) -> bool:
        """Whether any module is a DoRA module."""
        return any(delta.is_dora for delta in self.deltas.values())

    def is_whole(self, target: str) -> bool:
        """Whether it changes a tensor, and not by a low-rank delta."""
        return target in self.dense or (target in self.deltas and self.deltas[target].is_dora)

    def match(
        self,
        shapes: Mapping[str, Sequence[int]],
        structure: Callable[[], ModelStructure] = lambda: UNKNOWN,
        model_names: Callable[[], ModelNames | None] = lambda: None,
        *,
        into_adapter: bool = False,
    ) -> Adapter:
        """
        Return the same adapter with its modules mapped to tensors of a base checkpoint.

        Module paths are those of the model in memory; the checkpoint may have another prefix (with or without
        `"model."`). Whether a matrix is stored transposed follows from its shape in the base or, if it is square, from
        the base's class. PEFT's `fan_in_fan_out` is not used: it is one flag for all modules, and often wrong.

        Args:
            shapes (`Mapping[str, Sequence[int]]`):
                Shape of every tensor of the base checkpoint.
            structure (`Callable[[], ModelStructure]`, *optional*):
                Returns the facts about the base's class; called only if the tensors do not decide, as it takes
                seconds.
            model_names (`Callable[[], ModelNames | None]`, *optional*):
                Returns the names of the base's class; called only if names do not match.
            into_adapter (`bool`, *optional*, defaults to `False`):
                Whether the output is an adapter. Then a tied output layer needs no tensor in the base, and it does not
                matter how weights are stored.

        Raises:
            CheckpointError: If a module has no tensor, several, or one of another shape; if deltas would be added to a
                tied embedding, or to a square weight of which it is unknown how it is stored.
        """
        changed = {delta.target: delta.shape for delta in self.deltas.values()}
        changed |= {name: info.shape for name, info in (self.dense | self.base_layers).items()}
        # Only tensors outside of the numbered layers can be tied, so only for these must the class be asked.
        outside = [name for name in (*self.deltas, *self.dense) if self._may_be_tied(name)]
        if not into_adapter and outside:
            self._refuse_tied(outside, structure())
        stored = {leaf(name) for name in shapes}
        alone = [name for name in self.deltas if into_adapter and name in outside and leaf(name) not in stored]
        alone = [name for name in alone if structure().tied is not None and structure().ties(name)]
        matched = {name: changed[name] for name in changed if name not in alone}
        new = self._new_tensors(matched, shapes, model_names)
        known = {name: shape for name, shape in matched.items() if name not in new}
        targets = find_targets(self.spec, known, shapes, model_names) | {name: name for name in new}
        # PEFT also stores a copy of a tied output layer. It repeats the input embedding, which is compared anyway.
        base_layers = {name: info for name, info in self.base_layers.items() if name not in alone}
        for name, info in {name: info for name, info in (self.dense | base_layers).items() if name not in new}.items():
            self._check_shape(name, info.shape, targets[name], shapes[targets[name]])
        deltas = {name: self.deltas[name] for name in alone}
        for name, delta in self.deltas.items():
            if name not in alone:
                deltas[targets[name]] = self._orient(delta, targets[name], shapes, None if into_adapter else structure)
        return replace(
            self,
            deltas=deltas,
            dense={targets[name]: info for name, info in self.dense.items()},
            base_layers={targets[name]: info for name, info in base_layers.items()},
            new_tensors=frozenset(new),
        )

    def _new_tensors(
        self,
        matched: Mapping[str, Sequence[int]],
        shapes: Mapping[str, Sequence[int]],
        model_names: Callable[[], ModelNames | None],
    ) -> list[str]:
        """Return whole tensors that the base does not have under any name, outside of its numbered layers."""
        loose = [name for name in self.dense if name not in shapes and may_be_tied(name)]
        others = {name: shape for name, shape in matched.items() if name not in loose}

        def is_new(name: str) -> bool:
            try:
                find_targets(self.spec, {**others, name: matched[name]}, shapes, model_names)
            except CheckpointError:
                return True
            return False

        return [name for name in loose if is_new(name)]

    def check_base_layers(self, base: Checkpoint) -> None:
        """
        Compare the stored copies of base tensors with the base itself. Call it on a matched adapter.

        Raises:
            CheckpointError: If a copy differs, that is, if the adapter was trained on another base.
        """
        for target, info in self.base_layers.items():
            check_base_copy(self.checkpoint, info, base, target)

    def _orient(
        self,
        delta: LowRankDelta,
        target: str,
        shapes: Mapping[str, Sequence[int]],
        structure: Callable[[], ModelStructure] | None,
    ) -> LowRankDelta:
        """
        Return a delta with the name, shape and orientation of its tensor in the base.

        Without `structure` the orientation of a square weight does not matter, as for a merged adapter.
        """
        stored, transposed = tuple(shapes[target]), delta.transposed
        if delta.kind != "linear":
            self._check_shape(delta.target, delta.shape, target, stored)
        else:
            as_linear = (delta.up.shape[0], delta.down.shape[1])
            transposed = stored != as_linear
            self._check_shape(delta.target, as_linear[::-1] if transposed else as_linear, target, stored)
            if stored == stored[::-1] and structure is not None:
                transposed = self._is_conv1d(delta, target, shapes, structure)
        oriented = replace(delta, target=target, shape=stored, transposed=transposed)
        _refuse_unsupported_dora(self.spec, oriented)
        return oriented

    def _is_conv1d(
        self,
        delta: LowRankDelta,
        target: str,
        shapes: Mapping[str, Sequence[int]],
        structure: Callable[[], ModelStructure],
    ) -> bool:
        """Whether a square weight is stored as `(n_in, n_out)`."""
        if not may_be_conv1d(target, shapes):
            return False
        is_conv1d = structure().is_conv1d(delta.module)
        if is_conv1d is None:
            raise CheckpointError(
                f"Adapter {self.spec!r}: the weight of {delta.module!r} is square, and nothing tells whether the base "
                "stores it as (in, out) or as (out, in): transformers does not know the base's class. Merge the "
                "adapter into its base with PEFT's `merge_and_unload` and merge the full checkpoints."
            )
        return is_conv1d

    def _check_shape(self, name: str, expected: Sequence[int], target: str, stored: Sequence[int]) -> None:
        if tuple(expected) != tuple(stored):
            raise CheckpointError(
                f"Adapter {self.spec!r}: {name!r} changes a weight of shape {tuple(expected)}, but {target!r} of the "
                f"base has shape {tuple(stored)}. It belongs to another base, or its vocabulary was resized."
            )

    def _may_be_tied(self, name: str) -> bool:
        return may_be_tied(name) or (name in self.deltas and self.deltas[name].kind == "embedding")

    def _refuse_tied(self, names: Sequence[str], structure: ModelStructure) -> None:
        tied = [name.removesuffix(".weight") for name in names if structure.ties(name)]
        if not tied:
            return
        if structure.tied is None:
            raise CheckpointError(
                f"Adapter {self.spec!r} changes {some(tied)}, and nothing tells whether the base ties its input "
                "embedding and its output layer: transformers does not know its class. If they are separate, write "
                '"tie_word_embeddings": false into the config.json of the base.'
            )
        remedy = "Untie them" if self.dense else "Merge into an adapter (adapter_output='adapter'), or untie them"
        raise CheckpointError(
            f"Adapter {self.spec!r} changes {some(tied)}, but the base ties its input embedding and its output layer, "
            f"so one change would act on both. {remedy} once:\n"
            "    from torch.nn import Parameter\n"
            "    from transformers import AutoModelForCausalLM  # or the class you use\n"
            '    model = AutoModelForCausalLM.from_pretrained("THE BASE")\n'
            "    output_layer = model.get_output_embeddings()\n"
            "    output_layer.weight = Parameter(output_layer.weight.detach().clone())\n"
            "    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False\n"
            '    model.save_pretrained("untied")\n'
            "and pass that folder as base_model."
        )


def open_adapter(source: Source) -> Adapter:
    """
    Open a LoRA adapter and check its configuration and the shape of every factor; contents are not read yet.

    Args:
        source (`Source`):
            Result of `resolve`, of kind `"adapter"`.

    Returns:
        `Adapter`: Deltas by target tensor (`module + ".weight"`; see `Adapter.match`).

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
        elif copied := copied_from_base(stem):
            base_layers[copied] = info
        elif "lora_" in stem or ".base_layer." in stem or "trainable_tokens" in stem:
            raise CheckpointError(
                f"Adapter {source.spec!r}: tensor {name!r} is not a factor of a plain LoRA adapter (lora_A.weight, "
                "lora_B.weight, lora_embedding_A, lora_embedding_B). Save it again with PEFT's `save_pretrained`."
            )
        else:
            dense[stem] = info
    deltas = [_build_delta(checkpoint, config, module, slots) for module, slots in parts.items()]
    return Adapter(checkpoint, config, {delta.target: delta for delta in deltas}, dense, base_layers)


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
    # Factors of an embedding give its transpose. For linear layers this is a first guess, which `match` corrects by
    # the shape in the base.
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
