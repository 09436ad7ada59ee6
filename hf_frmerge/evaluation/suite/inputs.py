"""Resolve the models of an evaluation without loading them, and cut its texts into blocks that all can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.quantizers.auto import AutoHfQuantizer

from hf_frmerge.checkpoints.resolve import Source, resolve
from hf_frmerge.checkpoints.source import refuse_gguf
from hf_frmerge.checkpoints.tensors.quantised import made_by
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint, some
from hf_frmerge.checkpoints.vocabularies.tokenizer_file import moved_tokens, read_tokenizer
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.evaluation.record import Role
from hf_frmerge.evaluation.text.pair_blocks import Decoder, decoder_of, pair_blocks
from hf_frmerge.evaluation.text.token_blocks import Rows, TokenBlocks, cut, separate_rows, token_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_frmerge.evaluation.suite.settings import ModelSet

# The base comes first, so that adapters reuse it while it is loaded; the merged model last, to be compared with all.
_ORDER: dict[Role, int] = {"base": 0, "expert": 1, "merged": 2}


@dataclass(frozen=True)
class Inputs:
    """
    Models and texts of an evaluation.

    Attributes:
        roles: name -> role of every model, in the order of measuring.
        live: name -> model, for models in memory.
        sources: name -> resolved checkpoint, for all other models.
        base: base of the adapters.
        tokenizer: tokenizer shared by all models; `None` if there is none.
        texts: domain -> blocks of tokens.
        vocab_size: vocabulary size shared by all models.
    """

    roles: dict[str, Role]
    live: dict[str, torch.nn.Module]
    sources: dict[str, Source]
    base: Source | None
    tokenizer: PreTrainedTokenizerBase | None
    texts: dict[str, TokenBlocks]
    vocab_size: int

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens to text; without a tokenizer, return their ids."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return str(self.tokenizer.decode(list(tokens)))


def find_inputs(models: ModelSet, domains: Mapping[str, Rows], *, block_size: int, packing: bool) -> Inputs:
    """
    Resolve models and tokenize texts before the first model is loaded, so that a wrong name fails at once.

    Args:
        models (`ModelSet`): The models.
        domains (`Mapping[str, Rows]`): Name of a text -> its rows.
        block_size (`int`): Tokens a block.
        packing (`bool`): Join the rows of a text into one stream; else each row is a block.

    Raises:
        ArgumentError: If there is no model or no text, a role is missing, an adapter has no base, the models have
            different vocabularies, a model reads something else than one text, or a text cannot be used.
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
            sources[name] = resolve(str(spec), token=models.token, allow_pickle=models.allow_pickle)
    base = _find_base(models, sources)
    runs_base = any(source.kind == "adapter" for source in sources.values())
    refuse_gguf([*sources.values(), *([base] if base and runs_base else [])])
    for source in dict.fromkeys([*([base] if base else []), *sources.values()]):
        _refuse_wrapped(source)
    wholes = [_config(live.get(name), sources.get(name), base) for name in in_order]
    for name, whole in zip(in_order, wholes):
        _refuse_without_measures(name, whole)
        if name in sources:
            _refuse_unloadable(sources[name], whole)
    configs = [whole.get_text_config() for whole in wholes]
    vocab_size = _common_vocabulary(dict(zip(in_order, configs)))
    _refuse_other_tokens(sources)
    # Models with relative positions, and some that extrapolate without limit, lack this entry. The shortest limit
    # counts for all models, because only predictions from the same context can be compared.
    limits = [getattr(config, "max_position_embeddings", None) for config in configs]
    limit = min((limit for limit in limits if limit), default=None)
    tokenizer = models.processing_class or find_tokenizer([base, *sources.values()])
    decoder = _decoder(dict(zip(in_order, wholes)), live, sources, base)

    def blocks_of(rows: Rows) -> TokenBlocks:
        if decoder is not None:
            return pair_blocks(
                tokenizer, rows, decoder, block_size=block_size, vocab_size=vocab_size, max_positions=limit
            )
        if packing:
            return cut(token_stream(tokenizer, rows), block_size, vocab_size, limit)
        return separate_rows(tokenizer, rows, vocab_size, limit)

    texts = {domain: blocks_of(rows) for domain, rows in domains.items()}
    return Inputs(in_order, live, sources, base, tokenizer, texts, vocab_size)


def _find_base(models: ModelSet, sources: Mapping[str, Source]) -> Source | None:
    """Return the base of adapters: `base_model` if set, else the model whose role is base."""
    base = next((source for name, source in sources.items() if models.roles[name] == "base"), None)
    if models.base_model is not None:
        base = resolve(str(models.base_model), token=models.token, allow_pickle=models.allow_pickle)
    for other in sources.values():
        if other.kind == "adapter" and base is None:
            raise ArgumentError(f"{other.spec!r} is an adapter: pass the model it was trained from as base_model.")
    return base


def _refuse_wrapped(source: Source) -> None:
    """Raise for a checkpoint whose tensor names have a wrapper's prefix: it would be measured with random weights."""
    with open_checkpoint(source) as checkpoint:
        if checkpoint.wrapped:
            raise CheckpointError(
                f"{source.spec!r} was saved inside a wrapper (torch.compile, DDP or FSDP; {checkpoint.wrapped!r}). "
                "transformers does not know these names and would start from random weights. Save the model inside "
                "the wrapper (`model._orig_mod`, `model.module`) again."
            )


def _config(model: Any, source: Source | None, base: Source | None) -> Any:
    """Return the configuration of a model, for an adapter that of its base."""
    if source is None:
        return model.config
    return transformers.AutoConfig.from_pretrained(_whole(source, base).path)


def _whole(source: Source, base: Source | None) -> Source:
    """Return the source of the whole model: of an adapter its base."""
    whole = base if source.kind == "adapter" else source
    assert whole is not None  # `_find_base` raises for an adapter without a base
    return whole


def _decoder(
    configs: Mapping[str, Any], live: Mapping[str, Any], sources: Mapping[str, Source], base: Source | None
) -> Decoder | None:
    """
    Return what the decoder of encoder-decoders begins with; None if the models are none.

    Raises:
        ArgumentError: If only some are encoder-decoders, or they do not begin alike.
    """
    decoders: dict[str, Decoder | None] = {}
    for name, config in configs.items():
        if not getattr(config, "is_encoder_decoder", False):
            decoders[name] = None
        elif name in live:
            decoders[name] = decoder_of(config, getattr(live[name], "generation_config", None))
        else:
            folder = _whole(sources[name], base).path
            settings = Path(folder) / "generation_config.json"
            generation = transformers.GenerationConfig.from_pretrained(folder) if settings.is_file() else None
            decoders[name] = decoder_of(config, generation)
    first = next(iter(decoders.values()))
    for name, decoder in decoders.items():
        if decoder != first:
            raise ArgumentError(
                f"The models do not read alike: {name!r} has {decoder} and {next(iter(decoders))!r} {first}. Outputs "
                "can only be compared if decoders begin with one token (`decoder_start_token_id` in config.json)."
            )
    return first


def _refuse_without_measures(name: str, config: Any) -> None:
    """Raise for a model that does not read text and nothing else, before it is loaded."""
    kind = _unmeasured(config)
    if kind:
        raise ArgumentError(
            f"{name!r} ({config.model_type}) is {kind}. Causal language models, encoders, encoder-decoders, "
            "classifiers of text and of images can be evaluated. Measure this one with the script it was trained "
            "with; the merge itself is not affected."
        )


def _refuse_unloadable(source: Source, config: Any) -> None:
    """Raise for a quantised model that transformers cannot load here, before anything is loaded."""
    reason = _unloadable(source, getattr(config, "quantization_config", None))
    if reason:
        raise ArgumentError(
            f"{source.spec!r} is quantised, and transformers cannot load it here: {reason} Where a merge can read it, "
            "write out what its codes stand for, and measure that: `frmerge merge MODEL MODEL --method linear "
            "--output-dir PLAIN`."
        )


def _unloadable(source: Source, section: Any) -> str | None:
    """Say why transformers does not read the codes of a model; None if it does, or there are none."""
    if section is not None:
        try:
            AutoHfQuantizer.from_config(section, pre_quantized=True).validate_environment(device_map=None)
        except (ImportError, RuntimeError, ValueError) as error:
            return str(error).partition("\n")[0]
        return None
    with open_checkpoint(source) as checkpoint:
        recognised = made_by(checkpoint.tensors.values())
    # It would take codes for weights, or start from random ones.
    return recognised and f"its tensors are those of {recognised[0]}, and its config names no method that it knows."


def _unmeasured(config: Any) -> str | None:
    """Say what a model is that cannot be measured."""
    if getattr(config.get_text_config(), "vocab_size", None) is None:
        return "no model of text (its config has no vocab_size)"
    if not getattr(config, "is_encoder_decoder", False):
        return None
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None or not model_class.can_generate():
        return f"an encoder-decoder without a head that predicts tokens ({name or 'no class in its config'})"
    if model_class.main_input_name != "input_ids":
        return "an encoder-decoder that reads something else than text"
    return None


def _common_vocabulary(configs: Mapping[str, Any]) -> int:
    """Return the vocabulary size, and raise unless all models share it."""
    sizes = {name: config.vocab_size for name, config in configs.items()}
    if len(set(sizes.values())) > 1:
        raise ArgumentError(
            "Outputs can only be compared over one vocabulary, but these models have different sizes: "
            f"{', '.join(f'{name} {size}' for name, size in sizes.items())}. Resize their embeddings alike."
        )
    return next(iter(sizes.values()))


def _refuse_other_tokens(sources: Mapping[str, Source]) -> None:
    """Raise if a token has another id in one of the models: they would be measured on different texts."""
    read = [(name, tokenizer) for name, source in sources.items() if (tokenizer := read_tokenizer(source)) is not None]
    for name, tokenizer in read[1:]:
        first_name, first = read[0]
        moved = moved_tokens(first, tokenizer)
        if moved:
            raise ArgumentError(
                f"Outputs can only be compared over one vocabulary, but {len(moved)} tokens have other ids in "
                f"{name!r} than in {first_name!r} ({some(map(repr, moved))}). Evaluate each by itself."
            )


def find_tokenizer(donors: Sequence[Source | None]) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the first checkpoint that has one."""
    for donor in donors:
        if donor is not None and any(Path(donor.path).glob("tokenizer*")):
            return transformers.AutoTokenizer.from_pretrained(donor.path)
    return None
