"""Metrics by their names in a record: title, better direction, number of digits, type on the Hub, and meaning."""

from __future__ import annotations

from dataclasses import dataclass

from hf_frmerge.evaluation.record import EMBEDDING_COSINE
from hf_frmerge.evaluation.weakest import LOWER_IS_BETTER
from hf_frmerge.wording.numbers import decimals, number

ERROR = "_stderr"
_RECOVERY = "recovery_"


@dataclass(frozen=True)
class Metric:
    """
    Presentation of one metric.

    Attributes:
        digits: number of decimals; `None` for 4 significant digits, if the range of the metric is unknown.
        hub_type: id of the metric on the Hub.
        meaning: sentence for readers who do not know it.
    """

    name: str
    title: str
    digits: int | None
    hub_type: str
    meaning: str = ""

    @property
    def better(self) -> str | None:
        """`"lower"` or `"higher"`; `None` if it is not known which is better."""
        if self.name not in LOWER_IS_BETTER:
            return None
        return "lower" if LOWER_IS_BETTER[self.name] else "higher"

    @property
    def heading(self) -> str:
        """Title with the better direction, such as `Perplexity (lower is better)`."""
        return f"{self.title} ({self.better} is better)" if self.better else self.title

    def written(self, value: float | None) -> str:
        """Format a value of this metric."""
        return number(value, 4) if self.digits is None else decimals(value, self.digits)


_ALL = (
    Metric(
        "perplexity",
        "Perplexity",
        2,
        "perplexity",
        "How many continuations a model wavers between, on average, at each next piece of text.",
    ),
    Metric("loss", "Loss", 3, "loss", "In nats a token, the logarithm of the perplexity."),
    Metric(
        "token_accuracy",
        "Token accuracy",
        3,
        "accuracy",
        "How often its first guess at the next piece of text is right.",
    ),
    Metric("accuracy", "Accuracy", 3, "accuracy"),
    Metric("acc", "Accuracy", 3, "accuracy"),  # its name in lm-evaluation-harness
    Metric("acc_norm", "Accuracy, long answers weighed alike", 3, "acc_norm"),
    Metric("exact_match", "Exact match", 3, "exact_match"),
    Metric("f1", "F1", 3, "f1"),
    Metric("fisher_rao", "Fisher–Rao distance to the farthest expert (rad)", 3, "fisher_rao"),
    Metric("top1_agreement", "Same first guess as the farthest expert", 3, "top1_agreement"),
    Metric("objective", "Mean squared Fisher–Rao distance to the experts (rad²)", 4, "objective"),
    Metric("to_barycentre", "Fisher–Rao distance to the barycentre of the experts (rad)", 3, "to_barycentre"),
    Metric("effective_rank", "Effective rank over that of the experts, worst layer", 3, "effective_rank"),
    Metric(
        "activation_variance", "Activation variance over that of the experts, worst layer", 3, "activation_variance"
    ),
    Metric("repetition", "Repeated 4-grams in continuations", 3, "repetition"),
    Metric("entropy", "Entropy of continuations (nats)", 3, "entropy"),
)
METRICS = {metric.name: metric for metric in _ALL}


def metric_of(name: str) -> Metric:
    """Return the metric `name`; an unknown one gets its name as the title."""
    # The name of the expert is part of the metric's, so these cannot be listed in `METRICS`.
    if name.startswith(_RECOVERY):
        title = f"Share kept of what {name.removeprefix(_RECOVERY)} gained over the base"
        return Metric(name, title, 3, "recovery")
    if name.startswith(EMBEDDING_COSINE):
        return Metric(
            name,
            f"Mean cosine of embeddings to those of {name.removeprefix(EMBEDDING_COSINE)}",
            4,
            "embedding_cosine",
            "1 means that every text has the same embedding but for its length.",
        )
    title = name.replace("_", " ").strip() or name
    return METRICS.get(name) or Metric(name, title.capitalize(), None, name)


def is_error(name: str) -> bool:
    """Whether a metric is the standard error of another."""
    return name.endswith(ERROR)
