"""Searches of tiny models: what they report is what merging and evaluating by hand finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet
import pytest
from comparison_family import Family
from regions import inside

from hf_frmerge import FisherRaoMerger, MergingArguments, WeightSearch
from hf_frmerge.comparison.cell_file import CELLS_FILE
from hf_frmerge.comparison.texts import split_texts
from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.evaluation.models.merged import tokenizer_of
from hf_frmerge.evaluation.record import MERGED
from hf_frmerge.evaluation.suite.merge_evaluation import evaluate_merge, models_to_measure
from hf_frmerge.evaluation.suite.settings import RunSettings, SuiteOptions
from hf_frmerge.merging.record.find_models import MergeModels
from hf_frmerge.search.figure import FIGURE_FILE, front_figure
from hf_frmerge.search.record import RECORD_FILE, TABLE_FILE, Chosen, SearchRecord, Tried
from hf_frmerge.search.sentences import ALIKE, sentences
from hf_frmerge.weighting.pareto.region import Region


def search(family: Family, folder: Path, cache: Path, **changes) -> WeightSearch:
    settings = {"max_tokens": 0, "cache_dir": str(cache)} | changes
    args = settings.pop("args", MergingArguments(output_dir=str(folder)))
    experts, texts = settings.pop("experts", family.experts), settings.pop("texts", family.texts)
    return WeightSearch(experts, texts, settings.pop("base_model", family.base), args=args, **settings)


def kept_by_hand(
    family: Family, folder: Path, cache: Path, split: str, weights: Sequence[float], scale: float
) -> dict[str, float]:
    """Merge, write and evaluate: the share of each expert's gain that is kept."""
    args = MergingArguments(output_dir=str(folder), method="linear", space="deltas", scale=scale, overwrite=True)
    FisherRaoMerger(family.experts, args, list(weights), family.base).merge()
    texts = {}
    for name, rows in family.texts.items():
        splits = split_texts(name, rows, tokenizer_of(family.base), max_tokens=0, seed=42, reads="text")
        texts[name] = list(splits[split].rows)
    models = models_to_measure(MergeModels(family.experts, None, family.base), str(folder))
    record = evaluate_merge(models, texts, SuiteOptions(), RunSettings(cache_dir=cache))
    return {one.expert: one.share for one in record.recovery if one.model == MERGED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def record(family: Family, folder: Path, cache: Path) -> SearchRecord:
    return search(family, folder, cache).run()


def named(record: SearchRecord, name: str) -> Chosen:
    return next(row for row in record.chosen if name in row.names)


def test_what_is_chosen_is_what_merging_and_evaluating_gives(
    family: Family, record: SearchRecord, cache: Path, tmp_path: Path
) -> None:
    for name in ("balanced", "best for blue"):
        row = named(record, name)
        tested = kept_by_hand(family, tmp_path / "merged", cache, "test", row.weights, row.scale)
        assert row.by_place == pytest.approx(tested, abs=1e-6)
        assert row.score == pytest.approx(np.mean(list(tested.values())), abs=1e-6)
        validated = kept_by_hand(family, tmp_path / "merged", cache, "validation", row.weights, row.scale)
        assert row.validation == pytest.approx(validated, abs=1e-6)


def test_it_chooses_the_best_of_what_it_measured_and_better_than_equal_weights(record: SearchRecord) -> None:
    assert len(record.tried) >= 12 and record.settings["evaluations"] == 12
    mean = {(*tried.weights, tried.scale): np.mean(list(tried.scores.values())) for tried in record.tried}
    row = named(record, "balanced")
    assert mean[(*row.weights, row.scale)] >= max(mean.values()) - 1e-9 or named(record, ALIKE) is row
    alike = named(record, ALIKE)
    assert alike.weights == (0.5, 0.5)
    assert np.mean(list(row.validation.values())) >= np.mean(list(alike.validation.values()))
    for task in ("red", "blue"):
        best = named(record, f"best for {task}")
        assert best.validation[task] == max(tried.scores[task] for tried in record.tried)
    # Surrogates of a real model's losses, with the numbers that were chosen by: not exact, but no guess.
    assert all(fit > 0.8 for fit in record.fit.values())
    assert row.predicted == pytest.approx(row.validation, abs=0.15)
    points = np.array([np.array(one.weights) * one.scale for one in (*record.tried, *record.front)])
    assert inside(Region(2, (0.5, 2.0)), points.round(3)).all()
    assert [one.score for one in record.chosen] == sorted((one.score for one in record.chosen), reverse=True)


def test_files_hold_every_number(record: SearchRecord, folder: Path) -> None:
    assert json.loads((folder / RECORD_FILE).read_text()) == json.loads(json.dumps(record.to_dict()))
    rows = pyarrow.parquet.read_table(folder / TABLE_FILE).to_pylist()
    assert sum(row["kind"] == "tried" for row in rows) == 2 * len(record.tried)
    assert sum(row["kind"] == "front" for row in rows) == 2 * len(record.front)
    row = named(record, "balanced")
    tested = {r["task"]: r["score"] for r in rows if (r["name"], r["split"]) == (row.label, "test")}
    assert tested == row.by_place
    assert not list(folder.rglob("*.safetensors"))  # no model was written


def test_the_figure_shows_the_record(record: SearchRecord, folder: Path) -> None:
    [axes] = front_figure(record).axes
    [line] = axes.lines
    front = sorted((one.scores["red"], one.scores["blue"]) for one in record.front)
    np.testing.assert_allclose(np.transpose(line.get_data()), front)
    tried, *chosen = (collection.get_offsets() for collection in axes.collections)
    np.testing.assert_allclose(tried, [(one.scores["red"], one.scores["blue"]) for one in record.tried])
    places = [(row.validation["red"], row.validation["blue"]) for row in record.chosen]
    np.testing.assert_allclose(np.vstack(chosen), places)
    texts = " ".join(ElementTree.parse(folder / FIGURE_FILE).getroot().itertext())
    for words in (*(row.label for row in record.chosen), "red", "blue", "share of the gain kept"):
        assert words in texts


def test_a_figure_of_three_tasks_has_a_line_for_every_merge() -> None:
    scores = [{"a": 0.1 * n, "b": 1 - 0.1 * n, "c": 0.5} for n in range(5)]
    tried = [Tried((0.2, 0.8), 1.0, one) for one in scores]
    chosen = [Chosen((f"m{n}",), (0.2, 0.8), 1.0, {}, scores[n], 0.5, 0.1, scores[n], True, []) for n in (1, 3)]
    fit = dict.fromkeys("abc", 0.9)
    record = SearchRecord(["x"], None, "pareto", "linear", "loss", {}, {}, tried, fit, tried[:4], chosen, [])
    [axes] = front_figure(record).axes
    drawn = [line.get_ydata().tolist() for line in axes.lines]
    assert drawn == [list(one.values()) for one in [*scores[:4], scores[1], scores[3]]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]


def test_what_was_measured_is_not_measured_again(
    family: Family, record: SearchRecord, folder: Path, cache: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder, tmp_path / "copy")
    ran: list[str] = []
    assert search(family, folder, cache, on_progress=ran.append).run() == record and ran == []
    # A search in another way adds to it: the experts alone at scale 1, and equal weights, are there in part.
    greedy = search(family, folder, cache, by="greedy", on_progress=ran.append).run()
    assert 0 < len(ran) < 6 and greedy.front == [] and greedy.fit == {}
    with pytest.raises(ResumeError, match="other texts"):
        search(family, folder, cache, max_tokens=300).run()
    search(
        family, folder, cache, max_tokens=300, by="greedy", args=MergingArguments(str(folder), overwrite=True)
    ).run()


class Killed(BaseException):
    """Not caught by anything."""


def test_an_interrupted_search_goes_on(family: Family, record: SearchRecord, cache: Path, tmp_path: Path) -> None:
    ran: list[str] = []

    def stop(name: str) -> None:
        ran.append(name)
        if len(ran) == 8:
            raise Killed

    with pytest.raises(Killed):
        search(family, tmp_path, cache, on_progress=stop).run()
    assert not (tmp_path / RECORD_FILE).exists()
    lines = (tmp_path / CELLS_FILE).read_bytes().splitlines()
    rest: list[str] = []
    assert search(family, tmp_path, cache, on_progress=rest.append).run() == record
    n_measured = len((tmp_path / CELLS_FILE).read_bytes().splitlines())
    assert len(rest) == n_measured - len(lines) and 0 < len(lines) - 1 <= 8


def test_a_greedy_soup_is_that_of_merges_made_by_hand(family: Family, cache: Path, tmp_path: Path) -> None:
    record = search(family, tmp_path / "search", cache, by="greedy").run()

    def score(weights: Sequence[float]) -> float:
        kept = kept_by_hand(family, tmp_path / "merged", cache, "validation", weights, 1.0)
        return float(np.mean(list(kept.values())))

    alone = [score([1, 0]), score([0, 1])]
    expected = (0.5, 0.5) if score([0.5, 0.5]) >= max(alone) else tuple(np.eye(2)[int(np.argmax(alone))])
    soup = named(record, "greedy soup")
    assert soup.weights == expected and soup.scale == 1.0
    assert np.mean(list(soup.validation.values())) >= max(alone) - 1e-6
    assert named(record, "best expert").weights == tuple(np.eye(2)[int(np.argmax(alone))])
    assert not (tmp_path / "search" / FIGURE_FILE).exists()


@pytest.mark.parametrize("by", ["bayesian", "nested"])
def test_the_other_ways_find_weights_as_good(
    family: Family, record: SearchRecord, cache: Path, tmp_path: Path, by: str
) -> None:
    found = search(family, tmp_path, cache, by=by).run()
    best, plain = (np.mean(list(named(one, "balanced").validation.values())) for one in (found, record))
    assert best > plain - 0.05
    if by == "nested":  # of two experts
        assert named(found, "balanced").weights == named(record, "balanced").weights


def test_adapters_and_one_scale(family: Family, cache: Path, tmp_path: Path) -> None:
    """Their base is the one they name; with one scale there is one coordinate, and six merges are enough."""
    settings = {"experts": family.adapters, "base_model": None, "scales": [1.2], "method": "karcher,norm=max"}
    record = search(family, tmp_path, cache, **settings).run()
    assert record.base_model == family.base and record.method == "karcher norm=max"
    assert record.settings == {"scales": [1.2, 1.2], "evaluations": 6, "seed": 42, "max_tokens": 0}
    assert {one.scale for one in (*record.tried, *record.front, *record.chosen)} == {1.2}
    command = named(record, "balanced").command
    assert command[command.index("--norm") + 1] == "max" and "merged" in command  # --adapter-output


def test_without_a_base_losses_are_scored(family: Family, cache: Path, tmp_path: Path) -> None:
    record = search(family, tmp_path, cache, base_model=None).run()
    assert record.unit == "loss" and record.settings["evaluations"] == 6
    assert all(one.scale is None for one in record.chosen)
    best = named(record, "balanced")
    assert best.score == pytest.approx(np.mean(list(best.by_place.values()))) and best.score < 0
    assert any(sentence.startswith(f"{record.chosen[0].label[:1].upper()}") for sentence in sentences(record))
    assert any("a loss of" in sentence for sentence in sentences(record))
    with pytest.raises(ArgumentError, match="no scale without a base model"):
        search(family, tmp_path, cache, base_model=None, scales=[1.0, 2.0]).run()


WRONG = {
    "an unknown way": ({"by": "pareot"}, "no search by 'pareot': .* Did you mean 'pareto'"),
    "one expert": ({"experts": ["one"]}, "two or more experts, but got 1"),
    "scales of a soup": ({"by": "greedy", "scales": [1, 2]}, "of a search by 'greedy' are one positive number"),
    "three scales": ({"scales": [1, 2, 3]}, "the smallest and the largest; got"),
    "a negative scale": ({"scales": [-1, 2]}, "the smallest and the largest; got"),
    "too few evaluations": ({"n_evaluations": 5}, "2 weights and the scale is described by 6 numbers, which 5 merges"),
    "evaluations of a soup": ({"by": "greedy", "n_evaluations": 9}, "leave evaluations out"),
    "a method that needs prompts": (
        {"method": "mats"},
        "asks what the experts do on prompts, which a search does not",
    ),
    "no text": ({"texts": {}}, "give a text"),
}


@pytest.mark.parametrize(("settings", "sentence"), WRONG.values(), ids=WRONG)
def test_mistakes_are_told_before_anything_is_read(
    family: Family, cache: Path, tmp_path: Path, settings: dict, sentence: str
) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        search(family, tmp_path / "out", cache, **settings)
    assert not (tmp_path / "out").exists()


def test_nested_needs_each_experts_own_text(family: Family, cache: Path, tmp_path: Path) -> None:
    texts = {"one": family.texts["red"], "two": family.texts["blue"]}
    settings = {"by": "nested", "base_model": None, "texts": texts}
    with pytest.raises(ArgumentError, match="none is known of 'red'"):
        search(family, tmp_path / "a", cache, **settings).run()
    # What the message says.
    search(family, tmp_path / "b", cache, **{**settings, "base_model": family.base}).run()
    search(family, tmp_path / "c", cache, **{**settings, "texts": family.texts}).run()


def test_what_is_said() -> None:
    def row(name: str, score: float, *, is_tied: bool) -> Chosen:
        return Chosen((name,), (1.0,), 1.0, {}, {}, score, 0.02, {"a": score, "b": 0.4}, is_tied, [])

    rows = [row("balanced", 0.5, is_tied=True), row(ALIKE, 0.49, is_tied=True), row("best for a", 0.3, is_tied=False)]
    record = SearchRecord(
        ["a", "b"], "base", "pareto", "linear", "share", {}, {}, [], {"a": 0.95, "b": 0.5}, [], rows, ["A note."]
    )
    assert sentences(record) == [
        "Balanced: keeps 50.0% (± 2.0) of the experts' gains on average, and 40.0% of b, the least.",
        "Not told from it on these texts: all alike.",
        "So these texts do not tell that any weights are better than equal ones.",
        "The front is a guess: on merges left out of the fit its surrogates have an R² of b 0.50. Measure more merges "
        "(evaluations, --evaluations), on more text (max_tokens, --max-tokens), or with a narrower range of scales "
        "(scales, --scales).",
        "A note.",
    ]
