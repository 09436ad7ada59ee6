"""Settings of an evaluation: its models, how they are measured, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch.utils.data import DataLoader

    from hf_frmerge.evaluation.record import Role


@dataclass(frozen=True)
class ModelSet:
    """
    Models to measure together.

    Attributes:
        specs: name -> folder, Hub id, or a model in memory. The merged model is named `"merged"`.
        roles: name -> `"base"`, `"expert"` or `"merged"`.
        weights: name -> weight of the expert in the objective, scaled to sum to 1; equal by default.
        base_model: base of adapters; by default the model whose role is `"base"`.
        processing_class: tokenizer, or image processor of classifiers of images; by default that of the base, else of
            the first checkpoint with one.
        token: token for the Hub.
        allow_pickle: whether weights may be pickles, which transformers and PEFT load with `weights_only=True`.
    """

    specs: Mapping[str, str | Path | torch.nn.Module]
    roles: Mapping[str, Role]
    weights: Mapping[str, float] | None = None
    base_model: str | Path | None = None
    processing_class: Any = None
    token: str | None = None
    allow_pickle: bool = False


@dataclass(frozen=True)
class SuiteOptions:
    """
    How models are measured.

    Attributes:
        batch_size: blocks a forward pass, on each process.
        block_size: tokens a block; a token has at most `block_size - 1` tokens of context.
        dtype: dtype to load models in; `"auto"` is the one a model is stored in.
        top_k: likeliest outcomes stored of every prediction, with as many drawn from the rest. 0 stores full
            distributions, which takes `4 * V` bytes a token and model, and makes the distances exact.
        n_worst: worst tokens to show per expert and domain.
        n_prompts: generations per model and domain.
        max_new_tokens: tokens a generation.
        device_map: as in `from_pretrained`, for models larger than one device.
        packing: join the rows of a text into one stream, and cut it into blocks; else each row is a block.
    """

    batch_size: int = 8
    block_size: int = 256
    dtype: str | torch.dtype = "auto"
    top_k: int = 128
    n_worst: int = 10
    n_prompts: int = 1
    max_new_tokens: int = 32
    device_map: str | dict[str, Any] | None = None
    packing: bool = True


@dataclass(frozen=True)
class RunSettings:
    """
    Where an evaluation runs, and callbacks; nothing here changes a result.

    Attributes:
        accelerator: device and processes. Every process of a distributed run must take part; all get the result.
        cache_dir: folder of the cache, by default `$HF_FRMERGE_CACHE/evaluation`, else
            `~/.cache/hf_frmerge/evaluation`. All processes must see the same folder.
        num_workers: background processes that load the rows of classifiers.
        on_model: called with the name of every model before it is run; not called for models found in the cache.
        on_prediction_step: called after every batch.
        on_log_probs: called with the name of a model, that of a text, and the log-probability of every prediction of
            it, float64: of its tokens in order, or of the labels of its rows.
        classifiers: results of classifiers by name, used and added to except for models in memory, whose results are
            never kept; for a caller that evaluates many merges of the same experts on the same texts.
    """

    accelerator: Accelerator = field(default_factory=Accelerator)
    cache_dir: str | Path | None = None
    num_workers: int = 0
    on_model: Callable[[str], object] | None = None
    on_prediction_step: Callable[[DataLoader], None] | None = None
    on_log_probs: Callable[[str, str, NDArray[np.float64]], object] | None = None
    classifiers: dict[str, Any] | None = None
