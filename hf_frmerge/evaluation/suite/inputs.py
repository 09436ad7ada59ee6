"""What an evaluation works on: models, looked up but not loaded, and texts in blocks that all of them can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hf_frmerge.checkpoints.resolve import Source, resolve
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.evaluation.record import Role
from hf_frmerge.evaluation.text.token_blocks import Rows, TokenBlocks, cut, separate_rows, token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_frmerge.evaluation.suite.settings import ModelSet

# The base is measured first: adapters are put on it while it is loaded. The merged model is compared with all others.
_ORDER: dict[Role, int] = {"base": 0, "expert": 1, "merged": 2}


@dataclass(frozen=True)
class Inputs:
    """
    Attributes:
        roles: of every model, in the order they are measured.
        live: models in memory, by name.
        sources: all others, by name.
        base: what adapters are put on.
        tokenizer: of all models.
        texts: by domain.
        vocab_size: of all models.
    """

    roles: dict[str, Role]
    live: dict[str, torch.nn.Module]
    sources: dict[str, Source]
    base: Source | None
    tokenizer: PreTrainedTokenizerBase | None
    texts: dict[str, TokenBlocks]
    vocab_size: int

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text; without a tokenizer, their numbers."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return str(self.tokenizer.decode(list(tokens)))


def find_inputs(models: ModelSet, domains: Mapping[str, Rows], *, block_size: int, packing: bool) -> Inputs:
    """
    Look everything up before the first model is loaded, so that a wrong name fails at once.

    Raises:
        ArgumentError: If there is no model or no text, a role is missing, an adapter has no base, the models have
            vocabularies of different sizes, or a text cannot be used.
        CheckpointError: If a model is missing or broken.
    """
    if not models.specs or not domains:
        raise ArgumentError(f"Expected at least one model and one text, got {len(models.specs)} and {len(domains)}.")
    for name in models.specs:
        if name not in models.roles:
            raise ArgumentError(f"The model {name!r} has no role: say whether it is base, expert or merged.")
    in_order = {name: models.roles[name] for name in sorted(models.specs, key=lambda name: _ORDER[models.roles[name]])}
    live, sources = {}, {}
    for name in in_order:
        spec = models.specs[name]
        if isinstance(spec, torch.nn.Module):
            live[name] = spec
        else:
            sources[name] = resolve(str(spec), token=models.token)
    base = _find_base(models, sources)
    for source in dict.fromkeys([*([base] if base else []), *sources.values()]):
        _refuse_wrapped(source)
    configs = [_config(live.get(name), sources.get(name), base) for name in in_order]
    vocab_size = _common_vocabulary(dict(zip(in_order, configs)))
    # Models with relative positions, and those that extrapolate without limit, have no such entry.
    limits = [getattr(config, "max_position_embeddings", None) for config in configs]
    limit = min((limit for limit in limits if limit), default=None)
    tokenizer = models.processing_class or _find_tokenizer([base, *sources.values()])
    texts = {
        domain: cut(token_stream(tokenizer, rows), block_size, vocab_size, limit)
        if packing
        else separate_rows(tokenizer, rows, vocab_size, limit)
        for domain, rows in domains.items()
    }
    return Inputs(in_order, live, sources, base, tokenizer, texts, vocab_size)


def _find_base(models: ModelSet, sources: Mapping[str, Source]) -> Source | None:
    base = next((source for name, source in sources.items() if models.roles[name] == "base"), None)
    if models.base_model is not None:
        base = resolve(str(models.base_model), token=models.token)
    for other in sources.values():
        if other.kind == "adapter" and base is None:
            raise ArgumentError(f"{other.spec!r} is an adapter: pass the model it was trained from as base_model.")
    return base


def _refuse_wrapped(source: Source) -> None:
    with open_checkpoint(source) as checkpoint:
        if checkpoint.wrapped:
            raise CheckpointError(
                f"{source.spec!r} was saved inside a wrapper (torch.compile, DDP or FSDP; {checkpoint.wrapped!r}). "
                "transformers does not know these names and would start from random weights. Save the model inside "
                "the wrapper (`model._orig_mod`, `model.module`) again."
            )


def _config(model: Any, source: Source | None, base: Source | None) -> Any:
    if source is None:
        return model.config.get_text_config()
    whole = base if source.kind == "adapter" else source
    assert whole is not None  # checked when the base was looked for
    return transformers.AutoConfig.from_pretrained(whole.path).get_text_config()


def _common_vocabulary(configs: Mapping[str, Any]) -> int:
    sizes = {name: config.vocab_size for name, config in configs.items()}
    if len(set(sizes.values())) > 1:
        raise ArgumentError(
            "Outputs can only be compared over one vocabulary, but these models have different sizes: "
            f"{', '.join(f'{name} {size}' for name, size in sizes.items())}. Resize their embeddings alike."
        )
    return next(iter(sizes.values()))


def _find_tokenizer(donors: Sequence[Source | None]) -> PreTrainedTokenizerBase | None:
    for donor in donors:
        if donor is not None and any(Path(donor.path).glob("tokenizer*")):
            return transformers.AutoTokenizer.from_pretrained(donor.path)
    return None
