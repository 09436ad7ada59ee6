"""A whole comparison of tiny models: what it finds is what merging and evaluating by hand finds."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from comparison_family import WORDS, Family
from tiny_models import save_classifier_family
from transformers import BertModel

from hf_frmerge.comparison.cell_file import CELLS_FILE
from hf_frmerge.comparison.comparison import MergeComparison, _each_warning_once
from hf_frmerge.comparison.record import TABLE_FILE
from hf_frmerge.comparison.texts import split_texts
from hf_frmerge.errors import ArgumentError, MergeError, ResumeError
from hf_frmerge.evaluation.comparison_record import COMPARISON_FILE, ComparisonRecord, load_comparison
from hf_frmerge.evaluation.models.merged import tokenizer_of
from hf_frmerge.evaluation.record import MERGED
from hf_frmerge.evaluation.suite.merge_evaluation import evaluate_merge, models_to_measure
from hf_frmerge.evaluation.suite.settings import RunSettings, SuiteOptions
from hf_frmerge.merger import FisherRaoMerger
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.record.find_models import MergeModels

METHODS = ["linear", "karcher", "ties", "iso_c"]
SCALES = (0.7, 1.0, 1.4)


def comparison(family: Family, folder: Path, cache: Path, **changes) -> MergeComparison:
    settings = {"methods": METHODS, "scales": SCALES, "max_tokens": 0, "cache_dir": str(cache)} | changes
    args = settings.pop("args", MergingArguments(output_dir=str(folder)))
    experts = settings.pop("experts", family.experts)
    base, texts = settings.pop("base_model", family.base), settings.pop("texts", family.texts)
    return MergeComparison(experts, texts, base, args=args, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def record(family: Family, folder: Path, cache: Path) -> ComparisonRecord:
    return comparison(family, folder, cache).run()


def evaluated(family: Family, merged: Path, cache: Path, split: str):
    """What `frmerge evaluate` says of a merge on the texts of one split."""
    tokenizer = tokenizer_of(family.base)
    texts = {
        name: list(split_texts(name, rows, tokenizer, max_tokens=0, seed=42, reads="text")[split].rows)
        for name, rows in family.texts.items()
    }
    models = models_to_measure(MergeModels(family.experts, None, family.base), str(merged))
    return evaluate_merge(models, texts, SuiteOptions(), RunSettings(cache_dir=cache))


def merge_by_hand(family: Family, folder: Path, **options) -> None:
    args = MergingArguments(output_dir=str(folder), space="deltas", **options)
    FisherRaoMerger(family.experts, args, base_model=family.base).merge()


def test_a_row_is_what_merging_and_evaluating_gives(
    family: Family, record: ComparisonRecord, cache: Path, tmp_path: Path
) -> None:
    for row in record.methods:
        merge_by_hand(family, tmp_path / row.method, method=row.method, scale=row.scale)
        expected = evaluated(family, tmp_path / row.method, cache, "test")
        kept = {one.expert: one.share for one in expected.recovery if one.model == MERGED}
        assert row.by_place == pytest.approx(kept, abs=1e-6)
        assert row.score == pytest.approx(sum(kept.values()) / len(kept), abs=1e-6)
        own = [d.fisher_rao.mean for d in expected.distances if d.model == MERGED and d.other == d.domain]
        assert row.distance == pytest.approx(sum(own) / len(own), abs=1e-6)
        layers = expected.collapse()
        assert row.effective_rank == pytest.approx(min(layer.effective_rank for layer in layers), rel=1e-5)
        assert row.activation_variance == pytest.approx(min(layer.activation_variance for layer in layers), rel=1e-5)
    assert [row.score for row in record.methods] == sorted((row.score for row in record.methods), reverse=True)
    assert record.best.is_tied and record.unit == "share" and record.best.score > 0.2


def test_the_scale_is_the_best_on_the_validation_texts(
    family: Family, record: ComparisonRecord, cache: Path, tmp_path: Path
) -> None:
    (row,) = [row for row in record.methods if row.method == "karcher"]
    scores = {}
    for scale in SCALES:
        merge_by_hand(family, tmp_path / str(scale), scale=scale)
        expected = evaluated(family, tmp_path / str(scale), cache, "validation")
        kept = [one.share for one in expected.recovery if one.model == MERGED]
        scores[scale] = sum(kept) / len(kept)
    assert row.scale == max(scores, key=scores.get)
    assert row.validation == pytest.approx(scores[row.scale], abs=1e-6)
    assert row.is_edge == (row.scale in (SCALES[0], SCALES[-1]))
    assert {one.scale: one.score for one in row.tried} == pytest.approx(scores, abs=1e-6)


def test_files_hold_every_number(record: ComparisonRecord, folder: Path) -> None:
    assert json.loads((folder / COMPARISON_FILE).read_text()) == json.loads(json.dumps(record.to_dict()))
    assert load_comparison(folder) == record
    rows = pyarrow.parquet.read_table(folder / TABLE_FILE).to_pylist()
    cells = {(row["method"], row["scale"], row["split"]) for row in rows}
    assert len(cells) == len(METHODS) * (len(SCALES) + 1)
    best = record.best
    (value,) = [
        row["value"]
        for row in rows
        if (row["method"], row["scale"], row["split"], row["metric"]) == (best.method, best.scale, "test", "distance")
    ]
    assert value == best.distance
    assert {row["domain"] for row in rows if row["metric"] == "loss"} == set(record.best.by_place)
    assert not list(folder.rglob("*.safetensors"))  # no model was written


def test_finished_cells_are_not_run_again(family: Family, record: ComparisonRecord, folder: Path, cache: Path) -> None:
    ran: list[str] = []
    again = comparison(family, folder, cache, on_progress=ran.append).run()
    assert ran == [] and again == record
    more = comparison(family, folder, cache, methods=[*METHODS, "nre"], on_progress=ran.append).run()
    assert len(ran) == len(SCALES) + 1 and all(name.startswith("nre") for name in ran)
    assert [row.score for row in more.methods if row.method != "nre"] == [row.score for row in record.methods]


KILLED = """
import json, os, sys
from hf_frmerge.comparison.comparison import MergeComparison
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

experts, texts, base, folder, cache, methods, scales = json.loads(sys.argv[1])
begun = []

def stop(name):
    begun.append(name)
    if len([name for name in begun if "(" in name]) == 4:
        os._exit(9)  # nothing is closed or cleaned up, as by kill -9

MergeComparison(experts, texts, base, methods=methods, scales=scales, max_tokens=0, cache_dir=cache,
                args=MergingArguments(output_dir=folder), on_progress=stop).run()
"""


def test_a_killed_comparison_goes_on(family: Family, record: ComparisonRecord, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    inputs = [family.experts, family.texts, family.base, str(folder), str(cache), METHODS, SCALES]
    command = [sys.executable, "-c", KILLED, json.dumps(inputs)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    lines = (folder / CELLS_FILE).read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 3
    (folder / CELLS_FILE).write_bytes(b"".join(lines)[:-40])  # the kill also cut the last line short
    ran: list[str] = []
    resumed = comparison(family, folder, cache, on_progress=ran.append).run()
    assert len(ran) == len(METHODS) * (len(SCALES) + 1) - 2
    timeless = [[replace(row, seconds=0.0) for row in one.methods] for one in (resumed, record)]
    assert timeless[0] == timeless[1]
    assert resumed.command == record.command


def test_a_folder_of_another_comparison_is_refused_with_the_way_out(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    first = {"methods": ["linear"], "scales": (1.0,)}
    comparison(family, tmp_path, cache, **first).run()
    texts = {**family.texts, "red": family.texts["red"][:30]}
    with pytest.raises(ResumeError, match=r"comparison with other texts\. Choose .*--overwrite"):
        comparison(family, tmp_path, cache, texts=texts, **first).run()
    with pytest.raises(ResumeError, match="other experts"):
        comparison(family, tmp_path, cache, experts=family.experts[::-1], **first).run()
    args = MergingArguments(output_dir=str(tmp_path), overwrite=True)
    assert comparison(family, tmp_path, cache, texts=texts, args=args, **first).run().best.method == "linear"


def test_adapters_are_compared_as_full_models(family: Family, cache: Path, tmp_path: Path) -> None:
    texts = {f"{name}-lora": rows for name, rows in family.texts.items()}
    record = comparison(
        family, tmp_path, cache, experts=family.adapters, base_model=None, texts=texts, methods=["linear", "nre"]
    ).run()
    assert record.base_model == family.base  # which the adapters name
    assert list(record.best.by_place) == list(texts) and record.best.score > 0.1
    assert record.command[record.command.index("--adapter-output") + 1] == "merged"
    assert record.command[record.command.index("--base-model") + 1] == family.base


def test_merges_that_are_there_already_are_compared_as_they_are(family: Family, cache: Path, tmp_path: Path) -> None:
    merge_by_hand(family, tmp_path / "merge" / "karcher", method="karcher", scale=1.0)  # a method's name for a folder
    experts = [Path(expert) for expert in family.experts]
    also = [str(tmp_path / "merge" / "karcher"), *map(str, experts), family.adapters[1]]
    run = {"methods": ["karcher", "iso_c"], "scales": (1.0,), "also": also}
    record = comparison(family, tmp_path / "c", cache, **run).run()
    rows = {row.label: row for row in record.methods}
    made, ready = rows["karcher"], rows["karcher (as it is)"]
    assert ready.by_place == pytest.approx(made.by_place, abs=1e-6)  # which is the same merge
    assert (ready.model, ready.scale, ready.seconds, ready.memory) == (also[0], None, None, None)
    # An expert keeps all that it learned, whichever way it is stored.
    assert rows["red (as it is)"].by_place["red"] == pytest.approx(1.0, abs=1e-6)
    expected = evaluated(family, Path(family.adapters[1]), cache, "test").recovery
    kept = {one.expert: one.share for one in expected if one.model == MERGED}
    assert rows["blue-lora (as it is)"].by_place == pytest.approx(kept, abs=1e-6)
    made_here = [row for row in record.methods if row.model is None]
    assert record.command[record.command.index("--method") + 1] == made_here[0].method
    assert load_comparison(tmp_path / "c") == record
    ran: list[str] = []
    assert comparison(family, tmp_path / "c", cache, on_progress=ran.append, **run).run() == record and not ran
    merge_by_hand(family, tmp_path / "merge" / "karcher", method="karcher", scale=0.5, overwrite=True)
    again = comparison(family, tmp_path / "c", cache, on_progress=ran.append, **run).run()
    assert ran == [f"karcher (as it is) ({split})" for split in ("validation", "test")]  # its content is another
    assert {row.label: row.score for row in again.methods}["karcher (as it is)"] != ready.score


def test_a_merge_of_other_models_is_refused(family: Family, cache: Path, tmp_path: Path) -> None:
    save_classifier_family(tmp_path, WORDS, 0.5)
    ran: list[str] = []
    run = {"methods": ["linear"], "scales": (1.0,), "on_progress": ran.append}
    with pytest.raises(ArgumentError, match=r"math is BertFor\w+, and the experts are LlamaForCausalLM: .*--also"):
        comparison(family, tmp_path / "c", cache, also=[str(tmp_path / "math")], **run).run()
    assert ran == []  # before anything is measured
    comparison(family, tmp_path / "c", cache, **run).run()


def test_what_is_true_of_all_merges_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    evaluation = logging.getLogger("hf_frmerge.evaluation.suite.build_record")
    with _each_warning_once():
        for n_tokens in (5, 5, 6):
            evaluation.warning("of %d tokens", n_tokens)
    evaluation.warning("of %d tokens", 5)
    assert [one.getMessage() for one in caplog.records] == [f"of {n} tokens" for n in (5, 6, 5)]


def test_without_a_base_losses_are_compared(family: Family, cache: Path, tmp_path: Path) -> None:
    record = comparison(family, tmp_path, cache, base_model=None, methods=None).run()
    assert record.unit == "loss" and {row.scale for row in record.methods} == {None}
    assert {"linear", "karcher", "nre"} <= {row.method for row in record.methods}
    assert "No base model was given" in record.notes[0]
    assert set(record.best.by_place) == set(family.texts)
    assert "--scale" not in record.command and "--base-model" not in record.command


def test_weights_are_tried_with_every_method(family: Family, cache: Path, tmp_path: Path) -> None:
    weights = [(1.0, 0.0), (0.5, 0.5)]
    texts = {"red": family.texts["red"]}  # blue gains nothing on it, so all weight on red is best
    record = comparison(
        family, tmp_path, cache, methods=["linear", "nre"], scales=(1.0,), weights=weights, texts=texts
    ).run()
    assert [row.weights for row in record.methods] == [(1.0, 0.0)] * 2
    assert record.best.by_place["red"] == pytest.approx(1.0, abs=0.05)  # the expert itself, up to its rounding
    assert record.command[record.command.index("--weights") + 1] == "1.0,0.0"


def test_named_weights_are_measured_once(family: Family, cache: Path, tmp_path: Path) -> None:
    from hf_frmerge.weighting.plan_merge import plan_merge

    record = comparison(family, tmp_path / "c", cache, methods=["linear", "nre"], scales=(1.0,), weights=["nan"]).run()
    with closing(plan_merge(family.experts, MergingArguments(), "nan", family.base)) as plan:
        assert [row.weights for row in record.methods] == [tuple(plan.weights)] * 2
    assert len(set(record.best.weights)) == 2  # they are not equal
    assert any("Weights by 'nan': " in note for note in record.notes)


def test_a_post_step_is_part_of_all_merges_or_of_one(family: Family, cache: Path, tmp_path: Path) -> None:
    args = MergingArguments(output_dir=str(tmp_path / "c"), post_step="svc")
    record = comparison(family, tmp_path / "c", cache, methods=["karcher"], scales=(1.0,), args=args).run()
    merge_by_hand(family, tmp_path / "merged", method="karcher", scale=1.0, post_step="svc")
    expected = evaluated(family, tmp_path / "merged", cache, "test")
    kept = {one.expert: one.share for one in expected.recovery if one.model == MERGED}
    assert record.best.by_place == pytest.approx(kept, abs=1e-6)
    assert record.command[record.command.index("--post-step") + 1] == "svc"
    both = comparison(family, tmp_path / "d", cache, methods=["karcher,post_step=svc", "karcher"], scales=(1.0,)).run()
    by_label = {row.label: row.by_place for row in both.methods}
    assert by_label["karcher post_step=svc"] == record.best.by_place != by_label["karcher"]


def test_methods_that_draw_are_repeated(family: Family, cache: Path, tmp_path: Path) -> None:
    methods = ["linear", "dare_linear,density=0.5"]
    ran: list[str] = []
    run = {"methods": methods, "scales": (1.0,), "on_progress": ran.append}
    record = comparison(family, tmp_path / "c", cache, n_seeds=3, **run).run()
    assert len([name for name in ran if name.endswith("(test)")]) == 1 + 3
    rows = {row.method: row for row in record.methods}
    assert rows["linear"].seed_scores == ()
    for number, seed in enumerate((42, 43, 44)):
        folder = tmp_path / str(seed)
        merge_by_hand(family, folder, method="dare_linear", density=0.5, scale=1.0, seed=seed)
        kept = [one.share for one in evaluated(family, folder, cache, "test").recovery if one.model == MERGED]
        assert rows["dare_linear"].seed_scores[number] == pytest.approx(sum(kept) / len(kept), abs=1e-6)
    assert rows["dare_linear"].score == pytest.approx(sum(rows["dare_linear"].seed_scores) / 3)
    assert len(set(rows["dare_linear"].seed_scores)) == 3
    ran.clear()
    comparison(family, tmp_path / "c", cache, n_seeds=4, **run).run()
    assert len(ran) == 1  # the fourth seed


def test_a_comparison_of_fewer_experts_takes_what_was_measured_of_them(
    family: Family, cache: Path, tmp_path: Path
) -> None:
    experts = [*family.experts, family.adapters[0]]
    ran: list[str] = []
    settings = {"methods": ["linear"], "scales": (1.0,), "on_progress": ran.append}
    comparison(family, tmp_path / "3", tmp_path / "cache", experts=experts, **settings).run()
    assert {"base", "red", "blue", "red-lora"} < set(ran)
    ran.clear()
    record = comparison(family, tmp_path / "2", tmp_path / "cache", experts=experts[:2], **settings).run()
    assert ran == ["linear × 1 (validation)", "linear × 1 (test)"] and list(record.best.by_place) == ["red", "blue"]


def test_a_merge_whose_activations_overflow_is_no_obstacle(family: Family, cache: Path, tmp_path: Path) -> None:
    record = comparison(family, tmp_path, cache, methods=["linear"], scales=(1.0, 1e30)).run()
    assert record.best.scale == 1.0 and [one.scale for one in record.best.tried] == [1.0, 1e30]


def test_a_merge_whose_predictions_are_no_numbers_is_left_out(cache: Path, tmp_path: Path) -> None:
    save_classifier_family(tmp_path, WORDS, 0.5)  # attention over infinite scores is NaN
    rows = [{"text": " ".join(WORDS[n : n + 3]), "label": "yes"} for n in range(8)]
    record = MergeComparison(
        [str(tmp_path / name) for name in ("math", "code")],
        {"math": rows},
        str(tmp_path / "base"),
        methods=["linear"],
        scales=(1.0, 1e25),
        args=MergingArguments(output_dir=str(tmp_path / "comparison")),
        cache_dir=str(cache),
    ).run()
    assert record.best.scale == 1.0 and [one.scale for one in record.best.tried] == [1.0]


def test_classifiers_are_compared_by_their_labels(cache: Path, tmp_path: Path) -> None:
    save_classifier_family(tmp_path, WORDS, 0.5)
    labels = ["no", "maybe", "yes"]
    rows = [{"text": " ".join([*WORDS[n : n + 3], WORDS[n % 7]]), "label": labels[n % 3]} for n in range(36)]
    experts = [str(tmp_path / name) for name in ("math", "code")]
    ran: list[str] = []
    record = MergeComparison(
        experts,
        {"math": rows, "code": rows[::-1]},
        str(tmp_path / "base"),
        methods=["linear", "karcher"],
        scales=(0.5, 1.0),
        args=MergingArguments(output_dir=str(tmp_path / "comparison")),
        cache_dir=str(cache),
        on_progress=ran.append,
    ).run()
    assert [ran.count(name) for name in ("base", "math", "code")] == [2, 2, 2]  # once on either part of the texts
    assert record.texts["test"]["math"] == {"texts": 27, "predictions": 27}
    assert record.best.distance is not None and len(record.methods) == 2


def test_a_method_that_fails_leaves_the_others(family: Family, cache: Path, tmp_path: Path) -> None:
    # Both directions of the same expert: no direction is preferred where they cancel.
    from safetensors.torch import load_file, save_file

    base, red = (load_file(Path(folder) / "model.safetensors") for folder in (family.base, family.experts[0]))
    mirrored = tmp_path / "mirrored"
    mirrored.mkdir()
    for file in Path(family.experts[0]).iterdir():
        (mirrored / file.name).write_bytes(file.read_bytes())
    save_file(
        {name: 2 * base[name].float() - red[name] for name in red}, mirrored / "model.safetensors", {"format": "pt"}
    )
    record = comparison(
        family, tmp_path / "out", cache, experts=[family.experts[0], str(mirrored)], methods=["karcher", "linear"]
    ).run()
    assert [row.method for row in record.methods] == ["linear"]
    assert "balance out" in record.failed["karcher"]
    with pytest.raises(MergeError, match=r"No method gave a merge\. karcher: The experts balance out"):
        comparison(
            family, tmp_path / "none", cache, experts=[family.experts[0], str(mirrored)], methods=["karcher"]
        ).run()


def test_encoders_without_a_head_are_refused(tmp_path: Path) -> None:
    save_classifier_family(tmp_path, WORDS, 0.5)
    for name in ("math", "code"):
        BertModel.from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name}-encoder")
    experts = [str(tmp_path / f"{name}-encoder") for name in ("math", "code")]
    with pytest.raises(ArgumentError, match=r"The experts are BertModel, which predicts neither"):
        MergeComparison(experts, {"math": WORDS}, args=MergingArguments(output_dir=str(tmp_path / "c"))).run()


def test_mistakes_are_found_before_anything_is_run(family: Family, cache: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    for changes, message in (
        ({"methods": ["slerp"], "experts": [*family.experts, family.base]}, "exactly 2 experts"),
        ({"methods": ["ties"], "base_model": None}, "deltas. needs base_model"),
        ({"methods": ["ties,density=7"]}, "`density` must be above 0"),
        ({"scales": (float("nan"),)}, "Scales are finite numbers"),
        ({"weights": [(1.0, -1.0)]}, "weight"),
        ({"texts": {"red": ["w1"]}}, "too few"),
        ({"texts": {}}, "nothing to compare"),
    ):
        with pytest.raises(ArgumentError, match=message):
            comparison(family, tmp_path / "c", cache, on_progress=ran.append, **changes).run()
    assert ran == []
