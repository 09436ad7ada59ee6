"""Measure base, experts and merges of a comparison on its texts, with the evaluator of `frmerge evaluate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_frmerge.comparison.texts import SPLITS, Split, SplitTexts, TextLosses
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.evaluation.suite.merge_evaluation import evaluate_merge

if TYPE_CHECKING:
    from hf_frmerge.comparison.yardstick import Place
    from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions

Domains = dict[str, TextLosses]


@dataclass(frozen=True)
class Measured:
    """
    What a merge was measured to do on one split.

    Attributes:
        losses: domain -> loss on each of its texts.
        metrics: domain -> the evaluator's metrics, of the whole split.
        distance: Fisher-Rao distance to the experts, each on its own text, mean, in radians; `None` if not measured.
        effective_rank, activation_variance: of the layer that lost most, over the mean of the experts.
    """

    losses: Domains
    metrics: dict[str, dict[str, float]]
    distance: float | None = None
    effective_rank: float | None = None
    activation_variance: float | None = None


@dataclass(frozen=True)
class Evaluator:
    """
    Evaluator of a comparison.

    Attributes:
        models: base and experts; each of them is run once on a split.
        texts: split -> domain -> texts.
        options, run: as for `evaluate_merge`.
    """

    models: ModelSet
    texts: Mapping[Split, Mapping[str, SplitTexts]]
    options: SuiteOptions
    run: RunSettings
    # Language models are kept by the evaluation itself, on disk.
    _classifiers: dict[Split, dict[str, Any]] = field(default_factory=lambda: {split: {} for split in SPLITS})

    def sizes(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return the number of texts and of predictions, by split and domain."""
        return {
            split: {name: {"texts": len(one.rows), "predictions": one.n_predictions} for name, one in texts.items()}
            for split, texts in self.texts.items()
        }

    def references(self, split: Split) -> dict[str, Domains]:
        """Return the losses of base and experts on the texts of a split, by model."""
        return self._evaluate(self.models, split)[1]

    def validate(self, merged: Any) -> Measured:
        """Measure the losses of a merge on the validation texts, and nothing else."""
        alone = replace(self.models, specs={MERGED: merged}, roles={MERGED: "merged"}, weights=None)
        record, losses = self._evaluate(alone, "validation")
        return Measured(losses[MERGED], _metrics(record))

    def test(self, merged: Any, places: list[Place]) -> Measured:
        """Measure a merge on the test texts, beside base and experts."""
        together = replace(
            self.models, specs={**self.models.specs, MERGED: merged}, roles={**self.models.roles, MERGED: "merged"}
        )
        record, losses = self._evaluate(together, "test")
        distances = {(row.other, row.domain): row.fisher_rao.mean for row in record.distances if row.model == MERGED}
        to_own = [distances[place.name, place.domain] for place in places if (place.name, place.domain) in distances]
        layers = record.collapse()
        return Measured(
            losses[MERGED],
            _metrics(record),
            math.fsum(to_own) / len(to_own) if to_own else None,
            min((layer.effective_rank for layer in layers), default=None),
            min((layer.activation_variance for layer in layers), default=None),
        )

    def _evaluate(self, models: ModelSet, split: Split) -> tuple[EvaluationRecord, dict[str, Domains]]:
        texts = self.texts[split]
        losses: dict[str, Domains] = {}

        def keep(model: str, domain: str, log_probs: Any) -> None:
            losses.setdefault(model, {})[domain] = texts[domain].losses(log_probs)

        domains = {name: list(one.rows) for name, one in texts.items()}
        run = replace(self.run, on_log_probs=keep, classifiers=self._classifiers[split])
        record = evaluate_merge(models, domains, self.options, run)
        return record, losses


def _metrics(record: EvaluationRecord) -> dict[str, dict[str, float]]:
    return {score.domain: score.metrics for score in record.scores if score.model == MERGED}
