"""Scores of merges and their spread, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from hf_frmerge.comparison.texts import TextLosses
from hf_frmerge.comparison.yardstick import Place, gains_of, own_texts, score_of, standings

COUNTS = np.arange(5, 35)


def losses(level: float, seed: int, noise: float = 0.05) -> TextLosses:
    draw = np.random.default_rng(seed)
    return TextLosses((level + noise * draw.normal(size=30)) * COUNTS, COUNTS)


BASE = {"red": losses(4.0, 1), "blue": losses(5.0, 2)}
EXPERTS = {
    "red": {"red": losses(2.0, 3), "blue": losses(5.5, 4)},
    "other": {"red": losses(3.9, 5), "blue": losses(3.0, 6)},  # its name is no text: it gains most on blue
    "lost": {"red": losses(4.5, 7), "blue": losses(5.5, 8)},
}


def test_an_expert_is_scored_on_its_own_text() -> None:
    own = own_texts(BASE, EXPERTS)
    assert own == {"red": "red", "other": "blue", "lost": "red"}
    places = gains_of(BASE, EXPERTS, own)
    assert [(place.name, place.domain) for place in places] == [("red", "red"), ("other", "blue")]
    merged = {"red": losses(3.0, 9), "blue": losses(3.5, 10)}
    kept = [
        (BASE[place.domain].mean - merged[place.domain].mean)
        / (BASE[place.domain].mean - EXPERTS[place.name][place.domain].mean)
        for place in places
    ]
    assert score_of(merged, places) == pytest.approx(np.mean(kept), rel=1e-12)


def test_what_cannot_be_told_apart_is_tied() -> None:
    places = gains_of(BASE, EXPERTS, {"red": "red", "other": "blue"})
    good = {"red": losses(3.0, 11), "blue": losses(3.5, 12)}
    # As good on average, and another on every text.
    mixed = {
        name: TextLosses(one.sums + COUNTS * 0.01 * np.resize([1.0, -1.0], 30), COUNTS) for name, one in good.items()
    }
    bad = {name: TextLosses(one.sums + COUNTS * 0.02, COUNTS) for name, one in good.items()}
    result = standings({"good": good, "mixed": mixed, "bad": bad, "same": good}, BASE, places, seed=3)
    assert {name: one.is_tied for name, one in result.items()} == {
        "good": True,
        "mixed": True,
        "bad": False,
        "same": True,
    }
    # 0.02 nats on every text: told apart although the spread over texts is wider.
    assert result["good"].score - result["bad"].score < result["good"].error * 4
    assert standings({"good": good, "bad": bad}, BASE, places, seed=3)["good"] == result["good"]


def test_the_error_is_that_of_texts_drawn_again() -> None:
    places = gains_of(BASE, EXPERTS, {"red": "red"})
    merged = {"red": losses(3.0, 13, noise=0.5), "blue": losses(3.5, 14)}
    gain = BASE["red"].mean - EXPERTS["red"]["red"].mean
    draw, scores = np.random.default_rng(0), []
    for _ in range(4000):
        chosen = draw.integers(30, size=30)
        of_base, of_merged = (
            one["red"].sums[chosen].sum() / one["red"].counts[chosen].sum() for one in (BASE, merged)
        )
        scores.append((of_base - of_merged) / gain)
    result = standings({"merged": merged}, BASE, places, seed=1)["merged"]
    assert result.error == pytest.approx(np.std(scores), rel=0.1)  # of two samples of some thousand draws


def test_without_a_base_the_loss_counts() -> None:
    places = [Place("red", "red"), Place("blue", "blue")]
    merged = {"red": losses(3.0, 15), "blue": losses(3.5, 16)}
    result = standings({"merged": merged}, None, places, seed=1)["merged"]
    assert result.score == pytest.approx(-(merged["red"].mean + merged["blue"].mean) / 2)
    assert result.by_place == {"red": -merged["red"].mean, "blue": -merged["blue"].mean}
