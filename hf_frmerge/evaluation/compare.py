"""Compare several causal language models on several texts, one model in memory at a time."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge.checkpoints.resolve import Source, resolve
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.blocks import Rows
from hf_frmerge.evaluation.loop import evaluate_causal_lm, recovery

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Suffix -> builder of `datasets.load_dataset`. Every other file is read as one text.
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Score:
    """How well one model predicts one text: `loss` in nats a token over `n_tokens` tokens."""

    model: str
    domain: str
    loss: float
    perplexity: float
    token_accuracy: float
    n_tokens: int

    def to_dict(self) -> dict[str, str | float]:
        """Return the score as a row that can be written as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Recovered:
    """
    What a merged model keeps of one expert, on the text of that expert.

    Attributes:
        gain: How much better than the base the expert is, in nats a token.
        kept: How much better than the base the merged model is there, in nats a token.
        share: `kept / gain`; NaN if the expert is no better than the base.
    """

    model: str
    expert: str
    domain: str
    gain: float
    kept: float
    share: float

    def to_dict(self) -> dict[str, str | float | None]:
        """Return a row that can be written as JSON, which has no NaN."""
        return asdict(self) | {"share": None if math.isnan(self.share) else self.share}


def compare_models(
    models: Mapping[str, str | Path],
    texts: Mapping[str, Rows],
    *,
    base_model: str | Path | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype = "auto",
    batch_size: int = 8,
    block_size: int = 256,
    token: str | None = None,
    on_score: Callable[[Score], object] | None = None,
) -> list[Score]:
    """
    Evaluate every model on every text.

    All models read the same tokens: losses a token of different tokenizers could not be compared.

    Args:
        models (`Mapping[str, str | Path]`):
            Name to show -> folder or Hub id; full checkpoints, or PEFT adapters of `base_model`.
        texts (`Mapping[str, Iterable]`):
            Name of a domain -> rows of text or tokens, as `evaluate_causal_lm` takes them.
        base_model (`str` or `Path`, *optional*):
            Folder or Hub id of the model that adapters are put on. Needed if there are adapters.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer. Defaults to that of `base_model`, else of the first full checkpoint.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype to evaluate in; `"auto"` is the one a model is stored in.
        batch_size (`int`, *optional*, defaults to `8`):
            Blocks a forward pass.
        block_size (`int`, *optional*, defaults to `256`):
            Tokens a block: each is predicted from at most `block_size - 1` tokens before it.
        token (`str`, *optional*):
            Token for the Hub.
        on_score (`Callable[[Score], object]`, *optional*):
            Called after every model and text, to show progress.

    Returns:
        `list[Score]`: one for every model and text, models in the outer loop.

    Raises:
        ArgumentError: If there is no model or no text, or an adapter without a base model.
        CheckpointError: If a model is missing or broken.
    """
    if not models or not texts:
        raise ArgumentError(f"Expected at least one model and one text, got {len(models)} and {len(texts)}.")
    # All are looked up before the first is loaded, so that a wrong name fails at once.
    sources = {name: resolve(str(spec), token=token) for name, spec in models.items()}
    base = resolve(str(base_model), token=token) if base_model is not None else None
    for source in sources.values():
        if source.kind == "adapter" and base is None:
            raise ArgumentError(f"{source.spec!r} is an adapter: pass the model it was trained from as base_model.")
    donor = base or next(iter(sources.values()))
    tokenizer = processing_class or AutoTokenizer.from_pretrained(donor.path)
    scores = []
    for name, source in sources.items():
        model = _load(source, base, dtype)
        for domain, rows in texts.items():
            metrics = evaluate_causal_lm(model, tokenizer, rows, batch_size=batch_size, block_size=block_size)
            scores.append(
                Score(
                    name, domain, metrics.loss, metrics.perplexity, metrics.token_accuracy, n_tokens=metrics.n_tokens
                )
            )
            if on_score is not None:
                on_score(scores[-1])
        del model
        gc.collect()  # models hold reference cycles; the next one is loaded into the memory this frees
    return scores


def recovered(scores: Iterable[Score], merged: Iterable[str], experts: Iterable[str], base: str) -> list[Recovered]:
    """
    Return how much of every expert's gain over the base every merged model keeps.

    The text of an expert is the one of its name; without such a text, the one on which it gains most over the base.

    Args:
        scores (`Iterable[Score]`): Scores of all these models on all texts.
        merged (`Iterable[str]`): Names of merged models.
        experts (`Iterable[str]`): Names of the experts.
        base (`str`): Name of the base model.

    Returns:
        `list[Recovered]`: one for every merged model and expert.
    """
    losses: dict[str, dict[str, float]] = {}
    for score in scores:
        losses.setdefault(score.model, {})[score.domain] = score.loss
    experts = list(experts)
    rows = []
    for model in merged:
        for expert in experts:
            domain = expert
            if domain not in losses[expert]:
                domain = max(losses[expert], key=lambda name: losses[base][name] - losses[expert][name])
            base_loss, expert_loss, loss = (losses[name][domain] for name in (base, expert, model))
            share = recovery(base_loss, expert_loss, loss)
            rows.append(Recovered(model, expert, domain, base_loss - expert_loss, base_loss - loss, share))
    return rows


def read_texts(path: str | Path) -> Rows:
    """
    Read evaluation data from a file.

    Args:
        path (`str` or `Path`):
            `.jsonl`, `.json`, `.csv` or `.parquet` with a column `text` or `input_ids`; every other file is one text
            in UTF-8.

    Raises:
        ArgumentError: If there is no such file, or it is not text.
    """
    file = Path(path)
    if not file.is_file():
        raise ArgumentError(f"The evaluation data {str(file)!r} is not a file.")
    if file.suffix in _TABLES:
        from datasets import load_dataset

        return load_dataset(_TABLES[file.suffix], data_files=str(file), split="train")
    try:
        return [file.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"The evaluation data {str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it, "
            f"or use one of {', '.join(_TABLES)} with a column `text`."
        ) from error


def _load(source: Source, base: Source | None, dtype: str | torch.dtype) -> torch.nn.Module:
    if source.kind == "full":
        return AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype)
    from peft import PeftModel

    assert base is not None  # checked before anything was loaded
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
    return PeftModel.from_pretrained(model, source.path)
