"""Keep the Fisher information of models in files, so that it is estimated once."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from hf_frmerge.checkpoints.disk import make_folder, write_file
from hf_frmerge.errors import MergeError
from hf_frmerge.evaluation.models.identity import key_of, model_identity, tokens_identity
from hf_frmerge.evaluation.models.loading import ModelLoader
from hf_frmerge.evaluation.suite.suite import default_cache_dir
from hf_frmerge.fisher.diagonal import diagonal_fisher

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.source import Source

FORMAT = 1
"""Version of the files, part of every key; raise it when the same inputs would give another estimate."""


@dataclass(frozen=True)
class FisherRecord:
    """
    How the Fisher information in a file was estimated; kept in the file's header.

    Attributes:
        model: identity of the model.
        estimator: always `"sampled labels"`.
        n_prompts, n_predictions: over which it is a mean.
        seed: of the labels.
        norm: Euclidean norm of all values in the file.
    """

    model: list[str]
    estimator: str
    n_prompts: int
    n_predictions: int
    seed: int
    norm: float


@dataclass(frozen=True)
class FisherFile:
    """Diagonal Fisher information of a model, in a safetensors file."""

    path: Path
    record: FisherRecord

    def read(self, parameter: str) -> torch.Tensor:
        """
        Return the information of a parameter, float32, divided by the norm over all parameters.

        Experts have different scales of information: one that is unsure of everything would else count most.
        """
        with safe_open(self.path, "pt") as stored:
            information: torch.Tensor = stored.get_tensor(parameter)
        return information.float() / self.record.norm if self.record.norm else information.float()


def estimate_fisher(
    expert: Source,
    base: Source | None,
    prompts: Sequence[NDArray[np.int64]],
    parameters: Collection[str],
    *,
    seed: int,
    device: str = "cpu",
    is_silent: bool | None = None,
) -> FisherFile:
    """
    Estimate the diagonal Fisher information of an expert on its prompts, or find it in the user's cache.

    It is estimated in float32 and stored in bfloat16, which changes it by 0.4 % at most: its own error is far larger.

    Args:
        expert: Resolved checkpoint on this machine: a whole model, or an adapter, which is merged into its base.
        base: Base of adapters.
        prompts: Token ids `(T,)` of every prompt.
        parameters: Names of the parameters it is needed for.
        seed: Of the labels that are drawn.
        device: Where the model runs.
        is_silent: Whether no progress is shown; `None` shows it on a terminal.

    Raises:
        ArgumentError, NonFiniteError: As `diagonal_fisher` does, with the name of the expert.
        MergeError: If the cache cannot be written.
    """
    folder = default_cache_dir().parent / "fisher"
    make_folder(folder)
    identity = [model_identity(one) for one in (expert, *([base] if base and expert.kind == "adapter" else []))]
    tokens = [tokens_identity(torch.from_numpy(ids)) for ids in prompts]
    versions = [FORMAT, torch.__version__, transformers.__version__]
    path = folder / f"{key_of([versions, identity, tokens, sorted(parameters), seed, device])}.safetensors"
    try:
        return _open(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # not there, or damaged
        pass
    shown = tqdm(prompts, "Fisher information", unit="prompt", disable=is_silent)
    try:
        model = _whole_model(expert, base, device)
        information, n_predictions = diagonal_fisher(model, shown, parameters, seed=seed)
    except MergeError as error:
        raise type(error)(f"The Fisher information of {expert.spec!r} cannot be estimated. {error}") from error
    del model
    stored = {name: values.to("cpu", torch.bfloat16).contiguous() for name, values in information.items()}
    norm = math.sqrt(sum(float(values.double().square().sum()) for values in stored.values()))
    record = FisherRecord(identity, "sampled labels", len(prompts), n_predictions, seed, norm)
    write_file(path, save(stored, {"fisher": json.dumps(asdict(record))}))
    return _open(path)


def _open(path: Path) -> FisherFile:
    with safe_open(path, "pt") as stored:
        return FisherFile(path, FisherRecord(**json.loads(stored.metadata()["fisher"])))


def _whole_model(expert: Source, base: Source | None, device: str) -> torch.nn.Module:
    """Return a model in float32; an adapter's is merged, so that gradients are those of whole weights."""
    from peft import PeftModel

    model = ModelLoader(base, torch.float32, device).load(expert)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model
