"""Prompts that the experts write themselves, so that a merge can be fitted without any data."""

# Shape suffixes: B = prompts of a batch, T = tokens, V = vocabulary.

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from hf_frmerge.calibration.prompts.read_prompts import Prompts
from hf_frmerge.checkpoints.disk import make_folder, write_file
from hf_frmerge.checkpoints.source import Source
from hf_frmerge.errors import ArgumentError, MergeError, NonFiniteError
from hf_frmerge.evaluation.models.identity import key_of, model_identity
from hf_frmerge.evaluation.models.loading import ModelLoader, predicts_next_token
from hf_frmerge.evaluation.suite.suite import default_cache_dir
from hf_frmerge.merging.arguments.calibration import SELF, SELF_CHAT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3
"""Version of the cache, part of every key; raise it when the same inputs would give other prompts."""

BATCH = 64
"""Prompts that are written at once, and kept in one file."""

_MESSAGE = "hf_frmerge:message"  # stands for what a user writes, to be found in a chat again

_SEPARATOR = "<|endoftext|>"  # what GPT-2's descendants put between documents; many of them call another token bos


def document_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Return the token behind which a new text begins: the separator of documents, else one that begins or ends texts.

    Raises:
        ArgumentError: If the tokenizer has none of these.
    """
    separator = tokenizer.get_vocab().get(_SEPARATOR)
    for token in (separator, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return [token]
    raise ArgumentError(
        "The experts' tokenizer has no token that begins or ends a text, so they cannot write prompts of their own. "
        "Give prompts from a file."
    )


def chat_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Return what the chat template puts before a user's first message: behind it, a model writes such a message.

    Raises:
        ArgumentError: If the tokenizer has no chat template, or its template has nothing there.
    """
    if not tokenizer.chat_template:
        raise ArgumentError(
            "The experts' tokenizer has no chat template, so they cannot write as a user of a chat does. Put the "
            "chat_template.jinja that they were trained with beside the base, or let them write without one: "
            f"{SELF} in place of {SELF_CHAT}."
        )
    try:
        message = [{"role": "user", "content": _MESSAGE}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False))
    except Exception as error:  # templates are programs, which may raise anything
        raise ArgumentError(
            f"The chat template cannot be applied to a user's message ({error}). Let the experts write without it: "
            f"{SELF} in place of {SELF_CHAT}."
        ) from error
    before, message_found, _ = text.partition(_MESSAGE)
    prefix: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
    if not message_found or not prefix:
        raise ArgumentError(
            "The chat template puts nothing before a user's message, so there is nothing to write it behind. Let the "
            f"experts write without it: {SELF} in place of {SELF_CHAT}."
        )
    return prefix


def self_written_prompts(
    experts: Sequence[Source],
    base: Source | None,
    *,
    prefix: Sequence[int],
    leading: Sequence[int],
    n_samples: int,
    max_length: int,
    seed: int,
    dtype: str = "auto",
    device: str = "cpu",
    cache_dir: Path | None = None,
) -> tuple[Prompts, ...]:
    """
    Let every expert write its prompts. They are kept, under the content of the model and all options but their number.

    Whatever it is merged with, an expert writes the same prompts. They are written and kept by `BATCH`, so that 256 of
    them take no more memory than 64, begin with those 64, and are not lost if it ends early.

    What the texts are written behind is no part of the prompts, unless the tokenizer puts it before every text: the
    first token is one that all others look at, and a merge that was fitted with another one there than users' texts
    have does worse on these (it kept 86 % of what the demo's experts learned, without it 90 %).

    Args:
        experts (`Sequence[Source]`): Resolved checkpoints, on this machine; loaded one at a time.
        base (`Source`, *optional*): Base of adapters.
        prefix (`Sequence[int]`): As for `write_prompts`.
        leading: Tokens that stand before every text, which the prompts begin with: what the tokenizer puts there, or,
            for chats, the whole prefix.
        n_samples (`int`): Prompts of every expert.
        max_length (`int`): Tokens of each prompt.
        seed (`int`): Seed of all draws; every expert has its own, which depends on its content.
        dtype (`str`, *optional*, defaults to `"auto"`): Dtype to compute in; `"auto"` is the one a model is stored in.
        device (`str`, *optional*, defaults to `"cpu"`): Device to compute on.
        cache_dir (`Path`, *optional*): By default `prompts` in the user's cache, beside that of evaluations.

    Raises:
        ArgumentError, NonFiniteError: As `write_prompts` does, with the name of the expert.
        MergeError: If the cache cannot be written.
    """
    loader, prompts = ModelLoader(base, dtype, device), []
    for number, source in enumerate(experts):
        identities = identities_of(source, base)
        own_seed = seed_of(identities, seed)

        def write(model: Any, numbers: Sequence[int], own_seed: int = own_seed) -> NDArray[np.int64]:
            length = max_length + len(prefix) - len(leading)
            texts = write_prompts(model, numbers, length, prefix=prefix, seed=own_seed)
            begin = np.tile(np.array(leading, np.int64), (len(numbers), 1))
            return np.concatenate([begin, texts[:, len(prefix) :]], axis=1)

        key = [identities, [list(prefix), list(leading), max_length, own_seed, dtype, device]]
        written = kept_prompts(loader, source, key, n_samples, write, cache_dir)
        prompts.append(Prompts(number, written, SELF, tuple(leading)))
    return tuple(prompts)


def identities_of(source: Source, base: Source | None) -> list[Any]:
    """Return what tells an expert's content from that of others: its own, and for adapters the base's."""
    models = [source, *([base] if base is not None and source.kind == "adapter" else [])]
    return [model_identity(model) for model in models]


def seed_of(identities: Sequence[Any], seed: int) -> int:
    """Return the seed of what an expert writes, which depends on its content."""
    return int(key_of([seed, identities])[:16], 16)


def kept_prompts(
    loader: ModelLoader,
    source: Source,
    key: Sequence[Any],
    n_samples: int,
    write: Callable[[Any, Sequence[int]], NDArray[np.int64]],
    cache_dir: Path | None = None,
) -> tuple[NDArray[np.int64], ...]:
    """
    Return what an expert writes: from the cache, or written by `BATCH` and kept there.

    Args:
        loader: Loads the expert, if there is something to write.
        source: The expert.
        key: All that the prompts depend on, beside their numbers and the versions of libraries.
        n_samples: Number of prompts.
        write: Returns the prompts of some numbers, `(len(numbers), T)`.
        cache_dir: By default `prompts` in the user's cache.

    Raises:
        ArgumentError, NonFiniteError: As `write` does, with the name of the expert.
        MergeError: If the cache cannot be written.
    """
    folder = cache_dir if cache_dir is not None else default_cache_dir().parent / "prompts"
    make_folder(folder)
    versions = [FORMAT, torch.__version__, transformers.__version__]
    written: list[NDArray[np.int64]] = []
    model = None
    for start in range(0, n_samples, BATCH):
        numbers = range(start, min(start + BATCH, n_samples))
        # How many are written at once may decide about last digits, and so about a token.
        file = folder / f"{key_of([versions, *key, start, len(numbers)])}.npy"
        batch = _kept(file)
        if batch is None:
            model = model if model is not None else loader.load(source)
            try:
                batch = write(model, numbers)
            except MergeError as error:
                raise type(error)(f"The expert {source.spec!r} gives no prompts. {error}") from error
            content = io.BytesIO()
            np.save(content, batch)
            write_file(file, content.getvalue())
        written += list(batch)
    if model is not None:
        loader.release(model)
    return tuple(written)


def _kept(file: Path) -> NDArray[np.int64] | None:
    try:
        batch: NDArray[np.int64] = np.load(file)
    except (OSError, ValueError):  # not there, or damaged
        return None
    return batch


def write_prompts(
    model: torch.nn.Module, numbers: Sequence[int], max_length: int, *, prefix: Sequence[int], seed: int
) -> NDArray[np.int64]:
    """
    Let a language model write prompts: each token is drawn from its prediction, over the whole vocabulary.

    A prompt goes on behind tokens that end a text, as training text does.

    Args:
        model (`torch.nn.Module`): Causal language model of transformers.
        numbers (`Sequence[int]`):
            Which prompts: each has random numbers of its own, which do not depend on what is written beside it.
        max_length (`int`): Tokens of each, with those of the prefix.
        prefix (`Sequence[int]`): Tokens that all prompts begin with; at least one, fewer than `max_length`.
        seed (`int`): Seed of the draws. One machine writes the same batch of prompts again.

    Returns:
        `np.ndarray`: `(len(numbers), max_length)`, int64.

    Raises:
        ArgumentError: If the model does not predict the next token, or not with a cache of keys and values, or the
            prefix leaves no room for one.
        NonFiniteError: If the model predicts NaN or infinity.
    """
    check_can_write(model)
    if not 0 < len(prefix) < max_length:
        raise ArgumentError(
            f"Prompts of {max_length} tokens are to begin with {len(prefix)} given ones, which leaves nothing to "
            f"write. Raise max_calibration_length above {len(prefix)}."
        )
    n_drawn = max_length - len(prefix)
    uniform_BT = np.stack([np.random.default_rng([seed, n]).random(n_drawn) for n in numbers])
    return go_on(model, np.tile(np.array(prefix, np.int64), (len(numbers), 1)), uniform_BT)


def check_can_write(model: torch.nn.Module) -> None:
    """Raise `ArgumentError` if a model, which needs no weights for this, does not write text."""
    if not predicts_next_token(model):
        raise ArgumentError(
            f"{type(model).__name__} does not write text, so it cannot write prompts of its own: only causal language "
            "models can. Give prompts from a file."
        )


def go_on(model: torch.nn.Module, begun_BT: NDArray[np.int64], uniform_BT: NDArray[np.float64]) -> NDArray[np.int64]:
    """Let a language model go on with texts, as `write_behind` does, and leave it as it was."""
    model_any: Any = model
    was_training = model.training
    model.eval()
    begun = torch.from_numpy(begun_BT).to(model_any.device)
    written = write_behind(model, begun, torch.from_numpy(uniform_BT), type(model).__name__)
    model.train(was_training)
    found: NDArray[np.int64] = written.cpu().numpy()
    return found


def write_behind(
    forward: Callable[..., Any], begun_BT: torch.Tensor, uniform_BT: torch.Tensor, class_name: str
) -> torch.Tensor:
    """
    Go on with texts: each token is drawn from a language model's prediction, over the whole vocabulary.

    Args:
        forward: The model, called as those of transformers are.
        begun_BT: Tokens to go on behind, at least one.
        uniform_BT: A number in `[0, 1)` for every token that is to be drawn, float64.
        class_name: What to call the model in errors.

    Returns:
        All tokens of the texts, `(B, T)`.

    Raises:
        ArgumentError: If the model keeps no cache of keys and values.
        NonFiniteError: If it predicts NaN or infinity.
    """
    parts, uniform_BT = [begun_BT], uniform_BT.to(begun_BT.device)
    cache: dict[str, Any] = {}
    with torch.inference_mode():
        for place in range(uniform_BT.shape[1]):
            output = forward(input_ids=parts[-1], use_cache=True, **cache)
            cache = _cache(output, class_name)
            parts.append(_draw(output.logits[:, -1].float(), uniform_BT[:, place, None]))
    return torch.cat(parts, dim=1)


def _cache(output: Any, class_name: str) -> dict[str, Any]:
    """Return the argument that spares the next call the tokens so far; without it that call would not know of them."""
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ArgumentError(
            f"{class_name} keeps no past_key_values, so it cannot write text. Give prompts from a file, and leave out "
            "refine_lmbda (--refine-lmbda) and refine_written_samples (--refine-written-samples)."
        )
    return {"past_key_values": cache}


def _draw(logits_BV: torch.Tensor, uniform_B1: torch.Tensor) -> torch.Tensor:
    """
    Draw one token per row, `(B, 1)`, by inverting the cumulative distribution at one uniform number in `[0, 1)`.

    `torch.multinomial` draws a number for every token of the vocabulary, a fifth of the time of a small model.
    """
    cumulative_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:]
    if not bool(total_B1.isfinite().all()):
        raise NonFiniteError("The model predicts values that are not finite, so it cannot write text.")
    # The first token whose cumulative probability lies above; the last, should rounding put the number at the total.
    return torch.searchsorted(cumulative_BV, uniform_B1 * total_B1, right=True).clamp_max(logits_BV.shape[-1] - 1)
