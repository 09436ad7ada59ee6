"""The page of a comparison says what the record says: what is drawn, the table, and the sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comparison_records import SCALES, make_comparison, make_method
from matplotlib.axes import Axes
from test_page import HOSTILE, Page

from hf_frmerge.errors import CheckpointError
from hf_frmerge.evaluation.comparison_record import COMPARISON_FILE, ComparisonRecord, load_comparison, save_comparison
from hf_frmerge.report.comparison_figures import (
    cost_figure,
    draw_comparison,
    experts_figure,
    ranking_figure,
    scales_figure,
    trade_off_figure,
)
from hf_frmerge.report.comparison_page import render_comparison, save_comparison_figures, write_comparison_page
from hf_frmerge.report.style import MUTED, NARROW, PALETTE, WIDE
from hf_frmerge.wording.comparison import FIGURES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_comparison(tmp_path, make_comparison())
    return tmp_path


def losses() -> ComparisonRecord:
    """A comparison without a base: scores are losses with a minus sign."""
    rows = [make_method(name, score, best=-2.0) for name, score in (("linear", -2.0), ("nre", -2.5))]
    return make_comparison(methods=rows, unit="loss", base_model=None)


def points(axes: Axes) -> list[tuple[float, float, bool]]:
    """Value, row and whether it is filled, of every point that is drawn."""
    drawn = [line for line in axes.lines if line.get_marker() == "o"]
    paper = PALETTE["paper"][0]
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]), line.get_markerfacecolor() != paper) for line in drawn
    ]


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_ranking_shows_scores_leads_and_ties(width: float) -> None:
    record = make_comparison()
    scores, behind = ranking_figure(record, width).axes
    tied = [True, True, True, False, False, False]
    assert points(scores) == [(row.score, place, tied[place]) for place, row in enumerate(record.methods)]
    assert points(behind) == [(-row.lead, place, tied[place]) for place, row in enumerate(record.methods)]
    intervals = [list(line.get_xdata()) for line in scores.lines if len(line.get_xdata()) == 2]
    assert [list(row.interval) for row in record.methods] == intervals
    assert words(scores) == ["92.0%", "91.0%", "90.5%", "84.0%", "76.0%", "55.0%"]
    assert words(behind) == ["best", "tied", "tied", "−8.0", "−16.0", "−37.0", "◂"]
    # The last is so far behind that the axis ends before it, which is marked: 3 times the median end of an interval.
    assert behind.get_xlim()[0] == pytest.approx(-1.06 * 3 * 0.10)
    names = [label.get_text() for label in scores.get_yticklabels()]
    assert names[1:3] == ["nre × 1", "linear × 1.4"] and names[0].startswith("karcher, fitted")
    assert scores.get_ylim()[0] > scores.get_ylim()[1]  # the best is on top


def test_losses_are_drawn_as_losses() -> None:
    record = losses()
    scores, behind = ranking_figure(record).axes
    assert points(scores) == [(2.0, 0, True), (2.5, 1, False)]
    assert next(list(line.get_xdata()) for line in scores.lines if len(line.get_xdata()) == 2) == [1.94, 2.06]
    assert words(behind) == ["best", "−0.500"] and words(scores) == ["2.000", "2.500"]
    assert trade_off_figure(record) is None and "nats" in experts_figure(record).axes[0].get_xlabel()


@pytest.mark.parametrize("n_places", [2, 5, 9])
def test_experts_are_drawn_beside_each_other(n_places: int) -> None:
    record = make_comparison(n_places)
    (axes,) = experts_figure(record).axes
    drawn = points(axes)
    assert len(drawn) == n_places * len(record.methods)
    for value, place, _ in drawn:
        assert value in record.methods[round(place)].by_place.values()
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 1.6]
    assert len(lines) == (len(drawn) if n_places <= 6 else 0)  # of more experts only the points


def test_the_trade_off_is_mean_against_worst() -> None:
    record = make_comparison()
    (axes,) = trade_off_figure(record).axes
    expected = [(row.score, min(row.by_place.values())) for row in record.methods]
    assert [(x, y) for x, y, _ in points(axes)] == expected
    assert sum(text in ("nre × 1", "ties × 2") for text in words(axes)) == 2


def test_scales_are_drawn_as_they_were_tried() -> None:
    record = make_comparison()
    axes = [one for one in scales_figure(record).axes if one.get_visible()]
    assert [one.get_title(loc="left") for one in axes] == ["nre", "linear", "ties", "dare_ties", "model_stock"]
    for one, row in zip(axes, record.methods[1:]):
        curves = [line for line in one.lines if len(line.get_xdata()) == len(SCALES) and line.get_marker() == "o"]
        (curve,) = curves
        np.testing.assert_allclose(curve.get_xdata(), SCALES)
        np.testing.assert_allclose(curve.get_ydata(), [tried.score for tried in row.tried])
        assert points(one)[-1][:2] == (row.scale, row.validation)
    assert scales_figure(replace(record, methods=record.methods[:1])) is None


def test_what_is_not_counted_is_said() -> None:
    record = make_comparison()
    seconds, memory = cost_figure(record).axes
    assert [bar.get_width() for bar in seconds.patches] == [row.seconds for row in record.methods]
    assert words(memory) == ["not counted", *["200"] * 5]
    assert memory.patches[3].get_facecolor() == pytest.approx(
        (*(int(MUTED[at : at + 2], 16) / 255 for at in (1, 3, 5)), 1.0)
    )


def test_the_page_says_which_is_best_and_what_is_tied(folder: Path) -> None:
    page = Page(write_comparison_page(folder).read_text(encoding="utf-8"))
    text = page.text()
    assert "karcher, fitted to 112 prompts × 1 is best here: it keeps 92.0% (± 3.0)" in text
    assert "Not told from it on these texts: nre × 1 and linear × 1.4." in text
    assert "ties × 2 is 8.0 points behind the best (95%: 6.0 to 10.0), model_stock × 1, the last, 37.0." in text
    assert "dare_ties draws at random: with 2 seeds it has 75.0% to 77.0%, and the mean counts." in text
    assert "No merge by slerp: It takes two experts." in text and "A note." in text
    assert "frmerge merge expert-0 expert-1 --calibration self --output-dir merged" in text
    assert "3,000 predictions in 40 texts" in text
    heading, *rows = page.tables["methods"]
    assert [row[0] for row in rows][:3] == ["karcher, fitted to 112 prompts ✓", "nre ✓", "linear ✓"]
    behind = heading.index("Behind")
    assert [row[behind] for row in rows] == ["–", "1.0", "1.5", "8.0", "16.0", "37.0"]
    assert rows[3][heading.index("Scale")] == "2 !" and rows[0][heading.index("MB")] == "–"
    assert [row[heading.index("Worst")] for row in rows][1] == "87.0%"
    for name in FIGURES:
        assert f'id="figure-{name.replace("_", "_")}"' in (folder / "comparison.html").read_text(encoding="utf-8")


def test_it_loads_nothing_and_has_unique_ids(folder: Path) -> None:
    text = write_comparison_page(folder).read_text(encoding="utf-8")
    assert "://" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert write_comparison_page(folder).read_text(encoding="utf-8") == text  # the same record, the same page


def test_a_page_without_a_base_and_one_of_a_single_method() -> None:
    text = Page(render_comparison(losses())).text()
    assert "linear × 1 is best here: it loses 2.000 nats on average, ± 0.030." in text
    assert "nre × 1 is 0.500 nats behind the best" in text and "Loss on every text" in text
    single = make_comparison()
    text = Page(render_comparison(replace(single, methods=single.methods[:1]))).text()
    assert "is best here" in text and "Not told" not in text and "points behind the best" not in text


def test_hostile_text_stays_text(folder: Path) -> None:
    record = make_comparison()
    row = replace(record.best, label=HOSTILE, by_place={HOSTILE: 0.9}, place_intervals={HOSTILE: (0.8, 1.0)})
    others = [replace(row, label="linear $x_{$"), replace(row, label="\\frac $$")]
    save_comparison(
        folder, replace(record, methods=[row, *others], experts=[HOSTILE], command=[HOSTILE], notes=[HOSTILE])
    )
    page = Page(write_comparison_page(folder).read_text(encoding="utf-8"))
    assert len(page.scripts) == 1
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "img", "bdi-evil") and not [name for name in attributes if name.startswith("on")]
    assert HOSTILE in page.words


def test_figures_are_saved_as_files(folder: Path, tmp_path: Path) -> None:
    files = save_comparison_figures(folder, tmp_path / "figures")
    assert list(files) == list(FIGURES) == list(draw_comparison(load_comparison(folder)))
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files.values())


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry | {"methods": []},
        lambda entry: entry | {"unit": "euros"},
        lambda entry: entry | {"methods": [{**entry["methods"][0], "score": "high"}]},
        lambda entry: {name: value for name, value in entry.items() if name != "command"},
        lambda entry: entry | {"colour": "red"},
    ],
)
def test_a_damaged_record_is_refused_with_the_way_out(folder: Path, damage: Callable[[dict], dict]) -> None:
    file = folder / COMPARISON_FILE
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match=r"not what a comparison writes .*frmerge compare. again"):
        write_comparison_page(folder)
    file.write_text("{")
    with pytest.raises(CheckpointError, match=re.escape(COMPARISON_FILE)):
        write_comparison_page(folder)
