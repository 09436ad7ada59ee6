"""Find the layers of a transformer block that can be fitted, and how they depend on each other, by running it once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Call, Weights
from hf_frmerge.calibration.blocks.matrices import StoredMatrix, is_linear, n_out


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
class RoutedExpert:
    """
    Matrices of one expert of a mixture.

    Attributes:
        gate_up: what the gate is and what goes through it, in this order if they are stored as two.
        down: what is last.
    """

    gate_up: tuple[StoredMatrix, ...]
    down: StoredMatrix


@dataclass(frozen=True)
class RoutedExperts:
    """
    Experts of a mixture, each of which sees the tokens that are sent to it.

    Attributes:
        name: the module that has them all, named within the block.
        experts: each of them.
    """

    name: str
    experts: tuple[RoutedExpert, ...]


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
    """Return the experts of a mixture, if a module has them in a layout that classes of transformers share."""
    module = model.block(block).get_submodule(name)
    # Versions of transformers that lack a flag have no class of the other kind.
    is_gated = hasattr(module, "_apply_gate") and _flag(module, "has_gate", True)
    if not is_gated or _flag(module, "has_post_expert_norm"):
        return None
    gate_up, down = f"{name}.gate_up_proj", f"{name}.down_proj"
    if all(model.stacks.parts_of(block, stack) == [stack] for stack in (gate_up, down)):
        places = range(len(module.get_parameter("down_proj")))
        found = [RoutedExpert((_in_stack(module, gate_up, e),), _in_stack(module, down, e)) for e in places]
        return RoutedExperts(name, tuple(found))
    if not _flag(module, "is_concatenated", True) or _flag(module, "is_transposed") or _flag(module, "has_bias"):
        return None
    both = [[StoredMatrix(part, "") for part in model.stacks.matrices(block, stack)] for stack in (gate_up, down)]
    parts, last = both
    if not last or len(parts) != 2 * len(last):
        return None
    return RoutedExperts(name, tuple(map(RoutedExpert, zip(parts[::2], parts[1::2]), last)))


def _in_stack(module: nn.Module, stack: str, place: int) -> StoredMatrix:
    return StoredMatrix(stack, f"{stack}_bias", place, _flag(module, "is_transposed"))


def _flag(module: nn.Module, name: str, default: bool = False) -> bool:
    return bool(getattr(module, name, default))


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
        writes = len(run) == 1 and n_out(module.get_submodule(name)) == hidden_size and position > 0
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
