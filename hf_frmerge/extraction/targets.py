"""Find the tensors of linear layers and embeddings in a checkpoint, by the classes of the model's modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hf_frmerge.checkpoints.adapters.match import find_targets
from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.checkpoints.names.model_names import names_of
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, some
from hf_frmerge.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class ExtractTarget:
    """
    Module that an adapter may change.

    Attributes:
        module: path in the model in memory.
        tensor: name of its weight in the checkpoint.
        kind: `"linear"` or `"embedding"`.
        is_conv1d: whether it is GPT-2's kind of linear layer, which stores its weight as `(n_in, n_out)`.
    """

    module: str
    tensor: str
    kind: Literal["linear", "embedding"]
    is_conv1d: bool

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as the transpose of `up @ down`."""
        return self.is_conv1d or self.kind == "embedding"


def find_modules(base: Checkpoint, names: Sequence[str] | None) -> list[ExtractTarget]:
    """
    Find the modules to adapt and their tensors in the checkpoint.

    The model is built from `config.json` without weights, because the checkpoint does not tell module paths, nor
    whether a square weight is transposed.

    Args:
        base (`Checkpoint`):
            Base model.
        names (`Sequence[str]`, *optional*):
            Last names of modules; by default all linear layers but the output layer.

    Raises:
        ArgumentError: If a name matches no linear layer or embedding, or one that shares its weight with another.
        CheckpointError: If the model cannot be built, or the checkpoint lacks one of its modules.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    model = build_empty(base.config(), base.source.spec)
    output_layer = model.get_output_embeddings()
    matched: dict[str, tuple[Literal["linear", "embedding"], bool]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            may_match = names is not None
        elif isinstance(module, (torch.nn.Linear, Conv1D)):
            may_match = names is not None or module is not output_layer
        else:
            continue
        if may_match and (names is None or any(path == name or path.endswith("." + name) for name in names)):
            kind: Literal["linear", "embedding"] = "embedding" if isinstance(module, torch.nn.Embedding) else "linear"
            matched[path] = (kind, isinstance(module, Conv1D))
    unmatched = [n for n in names or () if not any(path == n or path.endswith("." + n) for path in matched)]
    if unmatched or not matched:
        raise ArgumentError(
            f"target_modules: {some(unmatched) or 'nothing'} names no linear layer or embedding of "
            f"{type(model).__name__}. Its layers are called like {some(_last_names(model))}."
        )
    tied = model.all_tied_weights_keys
    shared = [path for path in matched if f"{path}.weight" in {*tied, *tied.values()}]
    if shared:
        raise ArgumentError(
            f"target_modules: {some(shared)} shares its weight with another module of {type(model).__name__}, and an "
            "adapter would change only one of them. Leave it out."
        )
    tensors = _stored_weights(base, model, list(matched))
    return [ExtractTarget(path, tensors[path], kind, conv) for path, (kind, conv) in matched.items()]


def _stored_weights(base: Checkpoint, model: PreTrainedModel, paths: Sequence[str]) -> dict[str, str]:
    """Return the tensor of the checkpoint that holds the weight of every module."""
    weights = [f"{path}.weight" for path in paths]
    names = names_of(model)
    if names is None:
        shapes = {name: info.shape for name, info in base.tensors.items()}
        targets = find_targets(base.source.spec, weights, shapes)
        return {path: targets[weight] for path, weight in zip(paths, weights)}
    stored = {in_memory: name for name, in_memory in names.canonical(base.tensors).items()}
    missing = [path for path, weight in zip(paths, weights) if weight not in stored]
    if missing:
        raise CheckpointError(
            f"{base.source.spec!r} has no tensor for the weight of {some(missing)}, which {type(model).__name__}, the "
            "class its config.json names, has. Leave these modules out of `target_modules`, or pass the whole model."
        )
    return {path: stored[weight] for path, weight in zip(paths, weights)}


def task_type(config: dict[str, Any]) -> str | None:
    """Return PEFT's name for the task of a model, `None` if it has none."""
    architecture = next(iter(config.get("architectures") or []), "")
    if config.get("is_encoder_decoder") and architecture.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in _TASK_TYPES.items() if architecture.endswith(ending)), None)


def _last_names(model: PreTrainedModel) -> list[str]:
    """List the last names of all modules with a weight, sorted."""
    return sorted({path.rsplit(".", 1)[-1] for path, module in model.named_modules() if hasattr(module, "weight")})
