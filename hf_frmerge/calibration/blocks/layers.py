"""Find the layers of a transformer block that can be fitted, and how they depend on each other, by running it once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Call, Weights


@dataclass(frozen=True)
class LinearGroup:
    """
    Linear layers that share an input, and so a Gram matrix: query, key and value; gate and up; or one alone.

    Attributes:
        names: the layers, named within the block, in the order in which they run.
        writes: whether its output is added to the residual stream.
        norm_after: a norm that takes the sum; `None` if the next to read it is the end of the block.
        is_last: whether it is the last layer of the block that writes to the stream.
    """

    names: tuple[str, ...]
    writes: bool = False
    norm_after: str | None = None
    is_last: bool = False


@dataclass(frozen=True)
class RoutedExperts:
    """
    Experts of a mixture, each of which sees the tokens that are sent to it.

    Attributes:
        name: the module that has them all, named within the block.
        experts: the layers of each, named within the block: what the gate is, what goes through it, and what is last.
    """

    name: str
    experts: tuple[tuple[str, str, str], ...]


Step = LinearGroup | RoutedExperts | str


def names_of_step(step: Step) -> tuple[str, ...]:
    """Return the modules of a step, named within the block."""
    if isinstance(step, LinearGroup):
        return step.names
    return (step.name,) if isinstance(step, RoutedExperts) else (step,)


@dataclass(frozen=True)
class BlockLayers:
    """Layers of a block to fit, in the order of the forward pass: norms by name, linear layers, and mixtures."""

    steps: tuple[Step, ...]

    @property
    def groups(self) -> list[LinearGroup]:
        """The groups of linear layers."""
        return [step for step in self.steps if isinstance(step, LinearGroup)]

    @property
    def mixtures(self) -> list[RoutedExperts]:
        """The experts of mixtures."""
        return [step for step in self.steps if isinstance(step, RoutedExperts)]

    @property
    def norms(self) -> list[str]:
        """The norms."""
        return [step for step in self.steps if isinstance(step, str)]

    @property
    def is_post_norm(self) -> bool:
        """Whether a norm comes after the last layer that writes to the residual stream, as in BERT."""
        return any(group.is_last and group.norm_after for group in self.groups)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by one matrix."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales every channel by a factor of its own, and may shift it."""
    vectors = [parameter.ndim == 1 for parameter in module.parameters(recurse=False)]
    return "norm" in type(module).__name__.lower() and bool(vectors) and all(vectors)


def find_layers(model: BlockwiseModel, block: str, weights: Weights, hidden_TH: Tensor, call: Call) -> BlockLayers:
    """
    Run a block once, and group its layers by the tensors that enter them.

    Left out, so that they stay as merged, are layers that run twice (shared weights), and those that see only some of
    the tokens, as experts of a mixture do where these are modules of their own.
    """
    module = model.block(block)
    mixtures = {name: found for name, _ in module.named_modules() if (found := routed_experts(model, block, name))}
    # The inputs are kept, so that no two of them can have the same identity.
    events: list[tuple[str, Tensor]] = []
    handles = [
        child.register_forward_pre_hook(lambda _, args, name=name: events.append((name, args[0])))
        for name, child in module.named_modules()
        if is_linear(child) or is_norm(child) or name in mixtures
    ]
    try:
        model.run_block(block, weights, hidden_TH, call)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in events]
    places = hidden_TH.shape[:-1]
    events = [(n, x) for n, x in events if names.count(n) == 1 and x.shape[:-1].numel() == places.numel()]
    return BlockLayers(tuple(_in_steps(module, events, mixtures, hidden_TH.shape[-1])))


def routed_experts(model: BlockwiseModel, block: str, name: str) -> RoutedExperts | None:
    """Return the experts of a mixture, if a module has them in the layout that most classes of transformers have."""
    module = model.block(block).get_submodule(name)
    # Versions of transformers that lack a flag have no class of the other kind.
    plain = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    plain |= {"has_post_expert_norm": False}
    if not hasattr(module, "_apply_gate") or any(getattr(module, f, value) != value for f, value in plain.items()):
        return None
    gate_up, down = (
        [part.removesuffix(".weight") for part in model.stacks.matrices(block, f"{name}.{stack}")]
        for stack in ("gate_up_proj", "down_proj")
    )
    if not down or len(gate_up) != 2 * len(down):
        return None
    return RoutedExperts(name, tuple(zip(gate_up[::2], gate_up[1::2], down)))


def _in_steps(
    module: nn.Module, events: list[tuple[str, Tensor]], mixtures: dict[str, RoutedExperts], hidden_size: int
) -> list[Step]:
    runs: list[list[tuple[str, Tensor]]] = []
    for name, entering in events:
        linear = is_linear(module.get_submodule(name))
        if linear and runs and runs[-1][0][1] is entering and is_linear(module.get_submodule(runs[-1][0][0])):
            runs[-1].append((name, entering))
        else:
            runs.append([(name, entering)])
    steps: list[Step] = []
    for position, run in enumerate(runs):
        name = run[0][0]
        if is_norm(module.get_submodule(name)):
            steps.append(name)
            continue
        if name in mixtures:
            steps.append(mixtures[name])
            continue
        # The first layers read the stream; of those after them, one that is alone and as wide as the stream writes.
        writes = len(run) == 1 and _n_out(module.get_submodule(name)) == hidden_size and position > 0
        after = runs[position + 1][0] if position + 1 < len(runs) else None
        takes_sum = after is not None and is_norm(module.get_submodule(after[0])) and after[1].shape[-1] == hidden_size
        steps.append(
            LinearGroup(tuple(n for n, _ in run), writes, after[0] if after and writes and takes_sum else None)
        )
    writers = [index for index, step in enumerate(steps) if isinstance(step, LinearGroup) and step.writes]
    if writers:
        last = steps[writers[-1]]
        assert isinstance(last, LinearGroup)
        steps[writers[-1]] = LinearGroup(last.names, True, last.norm_after, is_last=True)
    return steps


def _is_norm_of(module: nn.Module, event: tuple[str, Tensor], hidden_size: int) -> bool:
    name, entering = event
    return is_norm(module.get_submodule(name)) and entering.shape[-1] == hidden_size


def n_in(module: nn.Module) -> int:
    """Return the number of inputs of a linear layer."""
    return int(module.get_parameter("weight").shape[0 if isinstance(module, Conv1D) else 1])


def _n_out(module: nn.Module) -> int:
    return int(module.get_parameter("weight").shape[1 if isinstance(module, Conv1D) else 0])


def is_flipped(module: nn.Module, name: str) -> bool:
    """Whether a linear layer stores its weight as `(in, out)`, as GPT-2 does."""
    try:
        return isinstance(module.get_submodule(name), Conv1D)
    except AttributeError:  # of an expert of a mixture, which is no module of its own
        return False


def matrix_of(module: nn.Module, weights: Weights, name: str, *, with_bias: bool) -> Tensor:
    """Return the weight of a linear layer as `(out, in)`; `with_bias` appends the bias as a last column."""
    matrix = weights[f"{name}.weight"]
    matrix = matrix.T if is_flipped(module, name) else matrix
    return torch.cat([matrix, weights[f"{name}.bias"][:, None]], dim=1) if with_bias else matrix


def put_matrix(module: nn.Module, weights: dict[str, Tensor], name: str, matrix: Tensor, *, with_bias: bool) -> None:
    """Store what `matrix_of` returns as the weights of a layer."""
    if with_bias:
        matrix, weights[f"{name}.bias"] = matrix[:, :-1], matrix[:, -1].contiguous()
    weights[f"{name}.weight"] = (matrix.T if is_flipped(module, name) else matrix).contiguous()
