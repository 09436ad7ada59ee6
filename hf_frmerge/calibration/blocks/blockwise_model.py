"""Run a model block by block, with weights that are handed in: only those of one block need to be in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_frmerge.calibration.blocks.stacks import Stacks
from hf_frmerge.checkpoints.names.model_names import Shape, names_of
from hf_frmerge.errors import ArgumentError

Weights = Mapping[str, Tensor]


class _Reached(Exception):
    """Ends a forward pass at the module of interest: what comes after it is not needed."""


@dataclass(frozen=True)
class Call:
    """Arguments of one block beside the hidden states: masks, positions and the like."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Outputs:
    """
    What a model gives for a batch, float32.

    Attributes:
        values: logits `(B, T, V)`, or `(B, V)` of a classifier; of a model without a head, hidden states `(B, T, H)`.
        is_logits: which of them.
    """

    values: Tensor
    is_logits: bool


class BlockwiseModel:
    """
    Modules of a transformers model without its weights, and the transformer blocks among them.

    Blocks are the members of the longest `ModuleList` whose class the model declares as not to be split
    (`_no_split_modules`), or of the longest one of any single class. Gradients reach the weights that are
    handed in, if these require them.

    Checkpoints store the experts of a mixture one by one, where models have them in one tensor. Then the weights that
    are handed in, and the names of parameters, are those of the single ones; they are joined to run.

    Args:
        model_class: A class of transformers.
        config: Its configuration.
        device: Where to compute.
        dtype: Dtype of the matrix products; hidden states between blocks are float32.
        stored: Tensors of a checkpoint; by default they have the names of the model.

    Attributes:
        blocks: name of every transformer block, in the order of the forward pass.
        stacks: what is stored in parts and joined to run.

    Raises:
        ArgumentError: If no blocks are found, or the model has an encoder and a decoder.
    """

    def __init__(
        self,
        model_class: Any,
        config: Any,
        device: torch.device,
        dtype: torch.dtype,
        stored: Mapping[str, Shape] | None = None,
    ) -> None:
        from accelerate import init_empty_weights

        if getattr(config, "is_encoder_decoder", False):
            raise ArgumentError(
                f"{model_class.__name__} has an encoder and a decoder, which cannot be calibrated yet. Merge without "
                "calibration."
            )
        for part in (config, config.get_text_config()):
            part.use_cache = False
        # Buffers such as the frequencies of rotary embeddings are computed, not stored: they must be real.
        with init_empty_weights(include_buffers=False):
            self.model = model_class(config).eval().requires_grad_(False)
        self.model.tie_weights()  # what was tied got parameters of its own on the meta device
        self.device, self.dtype = device, dtype
        self._modules = _block_modules(self.model, model_class.__name__)
        self.blocks = list(self._modules)
        for name, buffer in self.model.named_buffers():
            owner, _, last = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[last] = buffer.to(device)
        self._makes_tuple: bool | None = None  # known once a block has run
        names = names_of(self.model) if stored else None
        self.stacks = Stacks(self.model, self.blocks, names, stored or {})
        # Buffers with values of their own, as the bias by which DeepSeek's routers choose. What old files have of
        # others, such as frequencies, transformers does not load.
        loaded = names.in_memory & {names.rename(name) for name in stored} if names and stored else frozenset()
        self._stored_buffers = loaded & {n for n, b in self.model.named_buffers() if b.is_floating_point()}

    def block(self, name: str) -> nn.Module:
        """Return a block; its parameters are on the meta device."""
        return self._modules[name]

    def outer_parameters(self) -> list[str]:
        """Return the names of all parameters outside the blocks: embeddings, last norm and head."""
        inside = tuple(f"{name}." for name in self.blocks)
        return [name for name in self._own_names(self.model) if not name.startswith(inside)]

    def block_parameters(self, name: str) -> list[str]:
        """Return the names of a block's parameters, relative to the block."""
        own = self._own_names(self.block(name), f"{name}.")
        return [part for parameter in own for part in self.stacks.parts_of(name, parameter)]

    def parameters(self) -> list[str]:
        """Return the names of all parameters."""
        return self.outer_parameters() + [f"{b}.{name}" for b in self.blocks for name in self.block_parameters(b)]

    def computed(self, weights: Weights) -> dict[str, Tensor]:
        """
        Return weights as they are computed with, so that this is not done for every batch.

        Matrices are in the dtype of the products, to which autocast would convert them, and stacks are joined.
        """
        return self.stacks.join(
            {
                name: value.to(self.dtype) if value.ndim > 1 and "embed" not in name else value
                for name, value in weights.items()
            }
        )

    def behind_blocks(self, outer: Weights) -> dict[str, Tensor]:
        """
        Return weights outside the blocks as `finish` computes with them, so that this is not done for every prompt.

        A head that is the embedding as well is in the dtype of the products, too; what it embeds, `finish` replaces.
        """
        return {name: value.to(self.dtype) if value.ndim > 1 else value for name, value in outer.items()}

    def begin(self, outer: Weights, first_block: Weights, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """
        Embed a batch.

        Args:
            outer: Weights outside the blocks.
            first_block: Weights of the first block, which runs with the first batch to see what a block returns.
            inputs: Batch as the model takes it (`input_ids`, `attention_mask`).

        Returns:
            Hidden states `(B, T, H)` before the first block, float32, and the other arguments of every block.
        """
        entered: list[tuple[Tensor, Call]] = []

        def enter(*args: Any, **kwargs: Any) -> Any:
            hidden_BTH, call = _call(args, kwargs)
            entered.append((hidden_BTH.float(), call))
            if len(entered) == len(self.blocks):
                raise _Reached
            return (hidden_BTH,) if self._makes_tuple else hidden_BTH

        def enter_first(*args: Any, **kwargs: Any) -> Any:
            # What a block returns, the hidden states or a tuple that begins with them, has changed between versions.
            with other_forwards(self._modules.values(), None):
                result = functional_call(self.block(self.blocks[0]), self.stacks.join(first_block), args, kwargs)
            self._makes_tuple = isinstance(result, tuple)
            return enter(*args, **kwargs)

        first = enter_first if self._makes_tuple is None else enter
        forwards = [first, *[enter] * (len(self.blocks) - 1)]
        with other_forwards(self._modules.values(), forwards), self._computing(), suppress(_Reached):
            functional_call(self.model, dict(outer), (), dict(inputs))
        if len(entered) < len(self.blocks):
            raise ArgumentError(
                f"{type(self.model).__name__} does not run its blocks ({self.blocks[0]}, ...) on text alone, so it "
                "cannot be calibrated. Merge without calibration."
            )
        return entered[0][0], [call for _, call in entered]

    def run_block(self, name: str, weights: Weights, hidden_TH: Tensor, call: Call) -> Tensor:
        """Return the hidden states `(B, T, H)` after a block, float32."""
        with self._computing():
            result = functional_call(self.block(name), self.stacks.join(weights), (hidden_TH, *call.args), call.kwargs)
        return (result[0] if isinstance(result, tuple) else result).float()

    def finish(self, outer: Weights, hidden_TH: Tensor, inputs: Mapping[str, Tensor]) -> Outputs:
        """
        Return what the model gives, from the hidden states after the last block.

        Raises:
            ArgumentError: If it gives neither logits nor hidden states.
        """

        def replace(*_: Any, **__: Any) -> Any:
            return (hidden_TH,) if self._makes_tuple else hidden_TH

        with other_forwards(self._modules.values(), [replace] * len(self.blocks)), self._computing():
            output = functional_call(self.model, dict(outer), (), dict(inputs))
        for name in ("logits", "last_hidden_state"):
            values: Tensor | None = getattr(output, name, None)
            if values is not None:
                return Outputs(values.float(), is_logits=name == "logits")
        raise ArgumentError(
            f"{type(self.model).__name__} gives neither logits nor hidden states to judge a fit by. Merge without "
            "calibration."
        )

    def run_whole(self, weights: Weights, **inputs: Any) -> Any:
        """Return what transformers' whole model gives, with its arguments; all weights are in memory."""
        with self._computing():
            return functional_call(self.model, self.stacks.join(weights), (), inputs)

    def _own_names(self, module: nn.Module, prefix: str = "") -> list[str]:
        """Return the names of a module's parameters and stored buffers; `prefix` is its own with a dot."""
        buffers = [name for name, _ in module.named_buffers() if f"{prefix}{name}" in self._stored_buffers]
        return [name for name, _ in module.named_parameters()] + buffers

    def _computing(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class Taps:
    """
    Capture the inputs and outputs of modules of a block while it runs.

    Args:
        block: The block.
        names: Names of its modules to listen at.
        last: Stop the forward pass when this module is reached, after its input was captured.

    Attributes:
        inputs, outputs: module name -> first positional input, and output.
    """

    def __init__(self, block: nn.Module, names: Sequence[str], last: str | None = None) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._block, self._names, self._last = block, names, last
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        for name in self._names:
            module = self._block.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._before(name)))
            self._handles.append(module.register_forward_hook(self._after(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> bool:
        for handle in self._handles:
            handle.remove()
        return kind is _Reached

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs[name] = args[0]
            if name == self._last:
                raise _Reached

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            self.outputs[name] = output

        return hook


@contextmanager
def other_forwards(modules: Any, forwards: Sequence[Callable[..., Any]] | None) -> Iterator[None]:
    """Give modules other forward functions for a while; None gives them back their own."""
    modules = list(modules)
    before = [module.__dict__.pop("forward", None) for module in modules]
    for module, forward in zip(modules, forwards or ()):
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in zip(modules, before):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Take the hidden states out of the arguments of a block: the first, or one by name."""
    if args:
        return args[0], Call(args[1:], kwargs)
    return kwargs["hidden_states"], Call(
        (), {name: value for name, value in kwargs.items() if name != "hidden_states"}
    )


def _block_modules(model: Any, class_name: str) -> dict[str, nn.Module]:
    """Return the transformer blocks by name."""
    declared = set(getattr(model, "_no_split_modules", None) or ())
    # Of a model that also sees or hears only the part for text.
    text = set(model.get_decoder().modules()) if model.config.get_text_config() is not model.config else None
    stacks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and (text is None or module in text):
            kind, count = Counter(type(member).__name__ for member in module).most_common(1)[0]
            if count == len(module):
                stacks.append((kind in declared, len(module), name, module))
    if not stacks:
        raise ArgumentError(f"{class_name} has no list of transformer blocks, so it cannot be calibrated.")
    # Of equals the first, which is the outer one.
    _, _, name, blocks = max(stacks, key=lambda stack: stack[:2])
    return {f"{name}.{index}": block for index, block in enumerate(blocks)}
