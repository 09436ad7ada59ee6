"""Scores of merges and their spread, against plain loops."""

from __future__ import annotations

from operator import attrgetter

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
    result = standings({"good": [good], "mixed": [mixed], "bad": [bad], "same": [good]}, BASE, places, seed=3)
    assert {name: one.is_tied for name, one in result.items()} == {
        "good": True,
        "mixed": True,
        "bad": False,
        "same": True,
    }
    # 0.02 nats on every text: told apart although the spread over texts is wider.
    assert result["good"].score - result["bad"].score < result["good"].error * 4
    alone = standings({"good": [good], "bad": [bad]}, BASE, places, seed=3)["good"]
    assert (alone.score, alone.error, alone.interval) == attrgetter("score", "error", "interval")(result["good"])


def test_the_error_is_that_of_texts_drawn_again() -> None:
    places = gains_of(BASE, EXPERTS, {"red": "red"})
    merged = {"red": losses(3.0, 13, noise=0.5), "blue": losses(3.5, 14)}
    gain = BASE["red"].mean - EXPERTS["red"]["red"].mean
    draw, scores, leads = np.random.default_rng(0), [], []
    worse = {name: TextLosses(one.sums + COUNTS * np.resize([0.3, 0.1], 30), COUNTS) for name, one in merged.items()}
    for _ in range(4000):
        chosen = draw.integers(30, size=30)
        of_base, of_merged, of_worse = (
            one["red"].sums[chosen].sum() / one["red"].counts[chosen].sum() for one in (BASE, merged, worse)
        )
        scores.append((of_base - of_merged) / gain)
        leads.append((of_worse - of_merged) / gain)
    ranked = standings({"merged": [merged], "worse": [worse]}, BASE, places, seed=1)
    result = ranked["merged"]
    # Of two samples of some thousand draws.
    assert result.error == pytest.approx(np.std(scores), rel=0.1)
    assert result.interval == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.1 * np.std(scores) * 2)
    assert result.place_intervals == {"red": result.interval}
    assert ranked["worse"].lead == pytest.approx(result.score - ranked["worse"].score)
    assert ranked["worse"].lead_interval == pytest.approx(np.quantile(leads, [0.025, 0.975]), abs=0.2 * np.std(leads))


def test_repeats_are_drawn_too() -> None:
    places = [Place("red", "red")]
    exact = [{"red": TextLosses(level * COUNTS, COUNTS)} for level in (2.0, 3.0, 4.0)]  # no spread over texts
    draw = np.random.default_rng(0)
    means = [np.mean(draw.choice([-2.0, -3.0, -4.0], size=3)) for _ in range(4000)]
    result = standings({"random": exact, "still": [exact[1]]}, None, places, seed=2)
    assert result["random"].repeats == (-2.0, -3.0, -4.0) and result["random"].score == pytest.approx(-3.0)
    assert result["random"].error == pytest.approx(np.std(means), rel=0.1)
    assert result["still"].error == pytest.approx(0.0, abs=1e-12)
    assert result["random"].by_place["red"] == pytest.approx(-3.0)


def test_without_a_base_the_loss_counts() -> None:
    places = [Place("red", "red"), Place("blue", "blue")]
    merged = {"red": losses(3.0, 15), "blue": losses(3.5, 16)}
    result = standings({"merged": [merged]}, None, places, seed=1)["merged"]
    assert result.score == pytest.approx(-(merged["red"].mean + merged["blue"].mean) / 2)
    assert result.by_place == {"red": -merged["red"].mean, "blue": -merged["blue"].mean}
