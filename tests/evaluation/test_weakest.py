from __future__ import annotations

import math

import pytest

from hf_frmerge.evaluation.record import MERGED, Score
from hf_frmerge.evaluation.weakest import weakest_domain


def scores(metric: str, rows: dict[str, dict[str, float]]) -> list[Score]:
    return [Score(model, domain, {metric: v}) for model, actual in rows.items() for domain, v in actual.items()]


def test_perplexity_and_loss_choose_the_same_domain() -> None:
    # By difference of perplexities x would be the weakest (20), by loss it is y: ln 2 against ln 1.2.
    rows = {"a": {"x": 100.0, "y": 5.0}, MERGED: {"x": 120.0, "y": 10.0}}
    by_perplexity = weakest_domain(scores("perplexity", rows))
    by_loss = weakest_domain(scores("loss", {m: {d: math.log(v) for d, v in r.items()} for m, r in rows.items()}))
    assert by_perplexity is not None and by_loss is not None
    assert by_perplexity.domain == by_loss.domain == "y"
    assert by_perplexity.gap == pytest.approx(math.log(2)) and by_loss.gap == pytest.approx(math.log(2))
    assert (by_perplexity.merged, by_perplexity.best, by_perplexity.model) == (10.0, 5.0, "a")


def test_of_accuracies_the_higher_is_better() -> None:
    # By ratio x would be the weakest, 2 against 1.125; ten points of accuracy are less than the twelve on y.
    actual = weakest_domain(
        scores("accuracy", {"a": {"x": 0.2, "y": 0.99}, "b": {"x": 0.1, "y": 0.5}, MERGED: {"x": 0.1, "y": 0.87}})
    )
    assert actual is not None and (actual.domain, actual.model) == ("y", "a")
    assert actual.gap == pytest.approx(0.12)


def test_the_base_counts_and_no_number_is_the_worst() -> None:
    base_is_best = scores("loss", {"base": {"x": 1.0}, "a": {"x": 2.0}, MERGED: {"x": 1.5}})
    actual = weakest_domain(base_is_best)
    assert actual is not None and (actual.model, actual.gap) == ("base", 0.5)
    broken = weakest_domain(scores("perplexity", {"a": {"x": 2.0, "y": 2.0}, MERGED: {"x": 50.0, "y": math.nan}}))
    assert broken is not None and (broken.domain, broken.gap) == ("y", math.inf)


def test_there_is_none_without_a_comparison() -> None:
    assert weakest_domain(scores("loss", {MERGED: {"x": 1.0}})) is None
    assert weakest_domain(scores("mood", {"a": {"x": 1.0}, MERGED: {"x": 2.0}})) is None
    assert weakest_domain([]) is None
