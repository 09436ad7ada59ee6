"""Results of an evaluation, as plain numbers in one file beside the weights; terminal, card and report read it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.tensors.small_files import read_file
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.record.check_types import check_types
from hf_frmerge.merging.record.manifest import EVALUATION_FILE

FORMAT_VERSION = 2
"""Version of the file; records of other versions are ignored."""

MERGED = "merged"
"""Name of the merged model in every record."""

EMBEDDING_COSINE = "embedding_cosine_"
"""What the name of an expert follows in the name of a metric: the mean cosine of embeddings to those of the expert."""

Role = Literal["merged", "expert", "base"]


@dataclass(frozen=True)
class Score:
    """
    Metrics of one model on one domain.

    Attributes:
        metrics: values by name: `loss` in nats a token, `perplexity`, `token_accuracy`, `accuracy`,
            `embedding_cosine_<expert>`, or user metrics.
        n_tokens: tokens scored; 0 for classifiers and tasks of a harness.
        n_samples: rows of the dataset; 0 if they were joined into one stream.
    """

    model: str
    domain: str
    metrics: dict[str, float]
    n_tokens: int = 0
    n_samples: int = 0


@dataclass(frozen=True)
class Spread:
    """Summary statistics of a quantity over tokens: mean, median, 95th percentile, maximum."""

    mean: float
    median: float
    p95: float
    max: float


@dataclass(frozen=True)
class FunctionDistance:
    """
    Distances between the output distributions of two models on one domain.

    Attributes:
        model: the model in question: the merged one or, in expert-to-expert distances, an expert.
        other: the expert or base model it is compared with.
        n_tokens: predictions compared.
        fisher_rao: `2 * arccos(sum_v sqrt(p_v q_v))` per token, in radians, in `[0, pi]`.
        mean_squared: mean of `fisher_rao` squared, the term of Eq. 3 of arXiv 2603.04972.
        kl_other_model: mean `KL(other || model)`, nats a token.
        kl_model_other: mean `KL(model || other)`, nats a token.
        jensen_shannon: mean Jensen-Shannon divergence, nats a token, in `[0, ln 2]`.
        top1_agreement: share of tokens for which both find the same token likeliest.
        error: bound on the error of the mean of `fisher_rao`, in radians: three standard errors, and three biases, of
            sampling outcomes beyond the `top_k` likeliest; 0 if full distributions were compared.
        histogram: `(lower edge, number of tokens)` of equal bins of `fisher_rao` over `[0, pi]`.
    """

    model: str
    other: str
    domain: str
    n_tokens: int
    fisher_rao: Spread
    mean_squared: float
    kl_other_model: float
    kl_model_other: float
    jensen_shannon: float
    top1_agreement: float
    error: float = 0.0
    histogram: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Objective:
    """
    Eq. 3 of arXiv 2603.04972 on one domain.

    Attributes:
        value: `sum_i weight_i * E[d(merged, expert_i)^2]`, in squared radians.
        lowest: value of the exact Fisher-Rao barycentre of the experts' outputs, which no model can beat.
        to_barycentre: distance from the merged model to that barycentre, in radians.
        error: bound on the error of the mean of `to_barycentre`, in radians; as in `FunctionDistance`.
    """

    domain: str
    n_tokens: int
    value: float
    lowest: float
    to_barycentre: Spread
    error: float = 0.0


@dataclass(frozen=True)
class WorstToken:
    """
    A token on which the merged model is farthest from an expert.

    Attributes:
        context: text before it.
        token: the token that follows in the text.
        distance: Fisher-Rao distance between the two predictions of it, in radians.
        expert_guess: likeliest token of the expert, as text.
        merged_guess: likeliest token of the merged model.
        expert_probability: probability of `token` under the expert.
        merged_probability: probability of `token` under the merged model.
    """

    expert: str
    domain: str
    context: str
    token: str
    distance: float
    expert_guess: str
    merged_guess: str
    expert_probability: float
    merged_probability: float


@dataclass(frozen=True)
class LayerActivations:
    """
    Variance and rank of the activations of one layer, over all tokens of all domains (arXiv 2603.04972, Fig. 2).

    Attributes:
        layer: 0 for the output of the embedding, L for that of the last of L blocks.
        activation_variance: variance of each feature over tokens, averaged over features.
        effective_rank: `exp(-sum p ln p)`, p the eigenvalues of the centred covariance over their sum (Roy and
            Vetterli 2007).
    """

    model: str
    layer: int
    activation_variance: float
    effective_rank: float


@dataclass(frozen=True)
class Generation:
    """
    A short greedy continuation.

    Attributes:
        prompt: tokens of the domain it continues, as text.
        text: the continuation.
        repetition: share of token 4-grams that occurred earlier in the continuation, in `[0, 1]`.
        entropy: mean entropy of the predictions in the continuation, in nats.
    """

    model: str
    domain: str
    prompt: str
    text: str
    repetition: float
    entropy: float


@dataclass(frozen=True)
class Recovered:
    """
    Share of an expert's gain over the base that the merged model keeps, on the domain of that expert.

    Attributes:
        gain: loss of the base minus loss of the expert, in nats a token.
        kept: loss of the base minus loss of the merged model, in nats a token.
        share: `kept / gain`; `None` if the expert is no better than the base.
    """

    model: str
    expert: str
    domain: str
    gain: float
    kept: float
    share: float | None


@dataclass(frozen=True)
class CollapseRatio:
    """Variance and rank of a layer of the merged model over the mean of the experts; 1 means nothing was lost."""

    layer: int
    activation_variance: float
    effective_rank: float


@dataclass
class EvaluationRecord:
    """
    All results of the evaluation of one merge. Fields for what was not measured are empty.

    Attributes:
        models: name -> role. The merged model is named `"merged"`.
        weights: name -> weight of the expert in the objective.
        scores: metrics by model and domain.
        recovery: share of every expert's gain that was kept.
        distances: distances between outputs, by pair of models and domain.
        objectives: the objective and its minimum, by domain.
        worst_tokens: tokens on which the merged model is farthest from an expert.
        layers: activations, by model and layer.
        generations: greedy continuations.
        settings: evaluation settings: `block_size`, `dtype`, `top_k` of stored outputs (0: full distributions), ...
        commands: shell commands of external harnesses that were run.
    """

    models: dict[str, Role] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    recovery: list[Recovered] = field(default_factory=list)
    distances: list[FunctionDistance] = field(default_factory=list)
    objectives: list[Objective] = field(default_factory=list)
    worst_tokens: list[WorstToken] = field(default_factory=list)
    layers: list[LayerActivations] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @property
    def experts(self) -> list[str]:
        """Names of the experts, in order."""
        return [name for name, role in self.models.items() if role == "expert"]

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in order."""
        return list(dict.fromkeys(score.domain for score in self.scores))

    def collapse(self) -> list[CollapseRatio]:
        """Return the collapse ratio of every layer; empty unless the merged model and an expert were measured."""
        by_layer: dict[int, dict[str, LayerActivations]] = {}
        for row in self.layers:
            by_layer.setdefault(row.layer, {})[row.model] = row
        ratios = []
        for layer, rows in sorted(by_layer.items()):
            experts = [rows[name] for name in self.experts if name in rows]
            if MERGED not in rows or not experts:
                continue
            variance = math.fsum(row.activation_variance for row in experts) / len(experts)
            rank = math.fsum(row.effective_rank for row in experts) / len(experts)
            ratios.append(
                # NaN where the experts' mean is 0, that is, where their activations are constant.
                CollapseRatio(
                    layer,
                    rows[MERGED].activation_variance / variance if variance else math.nan,
                    rows[MERGED].effective_rank / rank if rank else math.nan,
                )
            )
        return ratios

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values; numbers that are not finite become `None`."""
        return _without_nan(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvaluationRecord:
        """Build a record from the result of `to_dict`; `None` is restored to NaN."""
        data = _with_nan(data)
        return cls(
            models=data["models"],
            weights=data["weights"],
            scores=[Score(**row) for row in data["scores"]],
            recovery=[Recovered(**row) for row in data["recovery"]],
            distances=[_distance(row) for row in data["distances"]],
            objectives=[
                Objective(**{**row, "to_barycentre": Spread(**row["to_barycentre"])}) for row in data["objectives"]
            ],
            worst_tokens=[WorstToken(**row) for row in data["worst_tokens"]],
            layers=[LayerActivations(**row) for row in data["layers"]],
            generations=[Generation(**row) for row in data["generations"]],
            settings=data["settings"],
            commands=data["commands"],
        )

    def update(self, other: EvaluationRecord) -> None:
        """Merge the results of `other` into this record; where both measured the same thing, `other` wins."""
        for part in fields(self):
            mine, theirs = self.__dict__[part.name], other.__dict__[part.name]
            if isinstance(mine, dict):
                mine.update(theirs)
            elif part.name == "commands":
                mine.extend(command for command in theirs if command not in mine)
            else:
                # Rows are replaced, not added: evaluating twice must not list a result twice.
                new = {_key(row) for row in theirs}
                mine[:] = [row for row in mine if _key(row) not in new] + theirs


def save_record(folder: Path | str, record: EvaluationRecord) -> None:
    """
    Write a record beside the merged weights, with a digest of the merge it belongs to.

    Args:
        folder (`Path` or `str`): Folder of the merged model.
        record (`EvaluationRecord`): The record.

    Raises:
        MergeError: If the file cannot be written.
    """
    folder = Path(folder)
    entry = {"format_version": FORMAT_VERSION, "merge": merge_digest(folder), **record.to_dict()}
    write_file(folder / EVALUATION_FILE, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")


def load_record(folder: Path | str) -> EvaluationRecord | None:
    """
    Read the record beside the merged weights, in a folder or behind a URL (`hub://org/name@commit`).

    Returns:
        `EvaluationRecord`, or `None` if there is no record, it has another format version, or the folder has been
        merged again since.

    Raises:
        CheckpointError: If the file is damaged.
    """
    opened = open_folder(str(folder))
    if not opened.exists(EVALUATION_FILE):
        return None
    try:
        entry = parse_json(read_file(opened, EVALUATION_FILE, str(folder)), finite=True)
    except ValueError as error:
        raise CheckpointError(f"{folder}/{EVALUATION_FILE} is not valid JSON: {error}. Evaluate again.") from error
    try:
        # A merge with other weights gives another digest, so an old record is never shown beside new weights.
        if entry.get("format_version") != FORMAT_VERSION or entry["merge"] != merge_digest(folder):
            return None
        record = EvaluationRecord.from_dict(entry)
        check_types(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # something is missing, or not of its type
        raise CheckpointError(
            f"{folder}/{EVALUATION_FILE} is not what an evaluation writes ({type(error).__name__}: {error}). Remove "
            "it, and evaluate again."
        ) from error
    return record


def merge_digest(folder: Path | str) -> str | None:
    """Return the digest of the coefficient table, which identifies a merge of given experts; `None` without one."""
    opened = open_folder(str(folder))
    return hashlib.sha256(opened.read(COEFFICIENTS_FILE)).hexdigest() if opened.exists(COEFFICIENTS_FILE) else None


def _distance(row: dict[str, Any]) -> FunctionDistance:
    """Rebuild a distance, with the tuples that JSON turned into lists."""
    histogram = tuple((edge, count) for edge, count in row["histogram"])
    return FunctionDistance(**{**row, "fisher_rao": Spread(**row["fisher_rao"]), "histogram": histogram})


def _key(row: Any) -> tuple[Any, ...]:
    """Return what identifies a row within the record, without what was measured."""
    names = ("model", "other", "expert", "domain", "layer", "prompt", "context")
    return (type(row).__name__, *(getattr(row, name, None) for name in names))


def _with_nan(value: Any) -> Any:
    """Replace `None` by NaN."""
    if isinstance(value, dict):
        # `Recovered.share` may be None, and so may any setting.
        return {k: item if k in ("share", "settings") else _with_nan(item) for k, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    """Replace numbers that are not finite by `None`, because JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
