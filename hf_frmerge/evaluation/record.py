"""What an evaluation found, as plain numbers in one file beside the weights: terminal, card and report read it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.record.manifest import EVALUATION_FILE

FORMAT_VERSION = 2

MERGED = "merged"
"""Name of the merged model in every record."""

Role = Literal["merged", "expert", "base"]


@dataclass(frozen=True)
class Score:
    """
    One model on one domain.

    Attributes:
        metrics: by name: `loss` in nats a token, `perplexity`, `token_accuracy`, `accuracy`, or what a user computes.
    """

    model: str
    domain: str
    metrics: dict[str, float]
    n_tokens: int = 0
    n_samples: int = 0


@dataclass(frozen=True)
class Spread:
    """Of a quantity over tokens: mean, median, 95th percentile, largest."""

    mean: float
    median: float
    p95: float
    max: float


@dataclass(frozen=True)
class FunctionDistance:
    """
    How far the outputs of two models are apart on the tokens of one domain.

    Attributes:
        model: the one that is asked about: the merged model or, in the yardstick between experts, one of them.
        other: the expert (or base model) it is compared with.
        n_tokens: predictions compared.
        fisher_rao: `2 * arccos(sum_v sqrt(p_v q_v))` a token, in radians, in `[0, pi]`.
        mean_squared: mean of its square, the term of Eq. 3 of arXiv 2603.04972.
        kl_other_model: mean `KL(other || model)`, nats a token.
        kl_model_other: mean `KL(model || other)`.
        jensen_shannon: mean Jensen-Shannon divergence, nats a token, in `[0, ln 2]`.
        top1_agreement: share of tokens on which both have the same first guess.
        error: how far the mean of `fisher_rao` may be from the exact one, in radians: three standard errors of the
            outcomes that were drawn beyond the `top_k` likeliest; 0 if whole distributions were compared.
        histogram: `(edge, count)`: tokens whose distance lies between an edge and the next, equal bins over `[0, pi]`.
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
        lowest: the same for the exact Fisher-Rao barycentre of the experts' outputs: no model can be below it.
        to_barycentre: distance of the merged model to that barycentre, in radians.
        error: how far the mean of `to_barycentre` may be from the exact one, in radians; as in `FunctionDistance`.
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
        token: the token the text has there.
        distance: Fisher-Rao distance of the two predictions of it, in radians.
        expert_guess, merged_guess: first guesses, as text.
        expert_probability, merged_probability: of `token`.
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
    Activations of one layer of one model, over all tokens of all domains (arXiv 2603.04972, Fig. 2).

    Attributes:
        layer: 0 is the output of the embedding, L that of the last block.
        activation_variance: variance over tokens of every feature, averaged over features.
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
        repetition: share of 4-grams of tokens that occurred before in the continuation, in `[0, 1]`.
        entropy: mean entropy of the predictions along it, in nats.
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
    What the merged model keeps of one expert, on the domain of that expert.

    Attributes:
        gain: how much better than the base the expert is, in nats a token.
        kept: how much better than the base the merged model is there, in nats a token.
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
    """One layer of the merged model over the mean of the experts: 1 means nothing was lost."""

    layer: int
    activation_variance: float
    effective_rank: float


@dataclass
class EvaluationRecord:
    """
    Everything an evaluation of one merge found. What was not measured is empty.

    Attributes:
        models: name -> role. The merged model is called `"merged"`.
        weights: weight of every expert in the objective, by name.
        settings: how it was measured: `block_size`, `dtype`, `top_k` of stored outputs (0: all of them), ...
        commands: external harnesses that were run, as a person would type them.
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
        """Return the merged model's layers over the mean of the experts'; empty if either was not measured."""
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
                CollapseRatio(
                    layer,
                    rows[MERGED].activation_variance / variance if variance else math.nan,
                    rows[MERGED].effective_rank / rank if rank else math.nan,
                )
            )
        return ratios

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it: numbers that are not finite become `None`."""
        return _without_nan(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvaluationRecord:
        """Build a record from what `to_dict` gave; where it has `None` for a number, that is not a number again."""
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
        """Take over what `other` measured; where both measured the same thing, `other` wins."""
        for part in fields(self):
            mine, theirs = self.__dict__[part.name], other.__dict__[part.name]
            if isinstance(mine, dict):
                mine.update(theirs)
            elif part.name == "commands":
                mine.extend(command for command in theirs if command not in mine)
            else:
                new = {_key(row) for row in theirs}
                mine[:] = [row for row in mine if _key(row) not in new] + theirs


def save_record(folder: Path | str, record: EvaluationRecord) -> None:
    """Write a record beside the merged weights, marked with the merge it belongs to."""
    folder = Path(folder)
    entry = {"format_version": FORMAT_VERSION, "merge": merge_digest(folder), **record.to_dict()}
    write_file(folder / EVALUATION_FILE, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")


def load_record(folder: Path | str) -> EvaluationRecord | None:
    """
    Read the record beside the merged weights, in a folder or behind a URL (`hub://org/name@commit`).

    `None` if there is none, or it is of a merge that was since replaced.

    Raises:
        CheckpointError: If the file is damaged.
    """
    opened = open_folder(str(folder))
    if not opened.exists(EVALUATION_FILE):
        return None
    try:
        entry = json.loads(opened.read(EVALUATION_FILE))
    except ValueError as error:
        raise CheckpointError(f"{folder}/{EVALUATION_FILE} is not valid JSON: {error}. Evaluate again.") from error
    if entry.get("format_version") != FORMAT_VERSION or entry["merge"] != merge_digest(folder):
        return None
    return EvaluationRecord.from_dict(entry)


def merge_digest(folder: Path | str) -> str | None:
    """The coefficient table identifies a merge of given experts."""
    opened = open_folder(str(folder))
    return hashlib.sha256(opened.read(COEFFICIENTS_FILE)).hexdigest() if opened.exists(COEFFICIENTS_FILE) else None


def _distance(row: dict[str, Any]) -> FunctionDistance:
    histogram = tuple((edge, count) for edge, count in row["histogram"])
    return FunctionDistance(**{**row, "fisher_rao": Spread(**row["fisher_rao"]), "histogram": histogram})


def _key(row: Any) -> tuple[Any, ...]:
    """What a row is about: all of it that is text or a layer's number, but for what was generated or guessed."""
    about = ("model", "other", "expert", "domain", "layer", "prompt", "context")
    return (type(row).__name__, *(getattr(row, name, None) for name in about))


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        # The share is `None` where it says nothing; the settings are whatever was set.
        return {k: item if k in ("share", "settings") else _with_nan(item) for k, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
