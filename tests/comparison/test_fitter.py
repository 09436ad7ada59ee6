"""A merge that is fitted to its experts, beside those without data."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from comparison_family import Family, text_of

from hf_frmerge.comparison.command import merge_command
from hf_frmerge.comparison.comparison import MergeComparison
from hf_frmerge.comparison.texts import split_texts
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.comparison_record import ComparisonRecord, MethodResult
from hf_frmerge.evaluation.models.merged import tokenizer_of
from hf_frmerge.evaluation.record import MERGED
from hf_frmerge.evaluation.suite.merge_evaluation import evaluate_merge, models_to_measure
from hf_frmerge.evaluation.suite.settings import RunSettings, SuiteOptions
from hf_frmerge.merger import FisherRaoMerger
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.record.find_models import MergeModels

N_PROMPTS = 16
FIT = {"num_calibration_samples": N_PROMPTS, "max_calibration_length": 32}


def prompts_of(family: Family) -> dict[str, list[str]]:
    """Text like that of the experts, which is not that on which they are measured."""
    return {expert: text_of(seed, 80)[40:] for seed, expert in enumerate(family.experts, start=1)}


def compared(family: Family, folder: Path, cache: Path, form: str = "auto", **changes) -> ComparisonRecord:
    args = MergingArguments(output_dir=str(folder), calibration_form=form, **FIT)
    settings = {"methods": ["linear"], "scales": (1.0,), "calibration_dataset": prompts_of(family)} | changes
    return MergeComparison(
        family.experts, family.texts, family.base, args=args, max_tokens=0, cache_dir=str(cache), **settings
    ).run()


def is_what_a_calibrated_merge_does(
    row: MethodResult, family: Family, cache: Path, tmp_path: Path, **options: str
) -> None:
    """Assert that a row says of a merge what an evaluation says of the same merge once it is written."""
    args = MergingArguments(output_dir=str(tmp_path / "merged"), space="deltas", **FIT, **options)
    FisherRaoMerger(family.experts, args, base_model=family.base, calibration_dataset=prompts_of(family)).merge()
    tokenizer = tokenizer_of(family.base)
    texts = {
        name: list(split_texts(name, rows, tokenizer, max_tokens=0, seed=42, reads="text")["test"].rows)
        for name, rows in family.texts.items()
    }
    models = models_to_measure(MergeModels(family.experts, None, family.base), str(tmp_path / "merged"))
    expected = evaluate_merge(models, texts, SuiteOptions(), RunSettings(cache_dir=cache))
    kept = {one.expert: one.share for one in expected.recovery if one.model == MERGED}
    assert row.by_place == pytest.approx(kept, abs=1e-5)


@pytest.mark.parametrize("form", ["auto", "table"])
def test_its_row_is_what_a_calibrated_merge_does(family: Family, cache: Path, tmp_path: Path, form: str) -> None:
    ran: list[str] = []
    record = compared(family, tmp_path / "c", cache, form, on_progress=ran.append)
    (row,) = [row for row in record.methods if row.n_prompts]
    assert row.n_prompts == 2 * N_PROMPTS * 7 // 8  # the others are held out from the fit
    assert row.label == f"karcher, fitted to {row.n_prompts} prompts" and row.memory is None
    assert record.best is row
    is_what_a_calibrated_merge_does(row, family, cache, tmp_path, calibration_form=form)
    assert not (tmp_path / "c" / ".fits").exists()

    ran.clear()
    compared(family, tmp_path / "c", cache, form, on_progress=ran.append)
    assert ran == []
    other = {expert: rows[:8] for expert, rows in prompts_of(family).items()}
    compared(family, tmp_path / "c", cache, calibration_dataset=other, on_progress=ran.append)
    assert ran == ["karcher, fitted × 1 (validation)", "karcher, fitted × 1 (test)"]


@pytest.mark.parametrize("method", ["regmean", "fisher"])
def test_methods_that_need_prompts_are_rows_beside_the_fit(
    family: Family, cache: Path, tmp_path: Path, method: str
) -> None:
    record = compared(family, tmp_path / "c", cache, methods=["linear", method])
    rows = {row.method: row for row in record.methods}
    assert rows.keys() == {"linear", "karcher", method}
    assert rows[method].label == f"{method}, fitted to {rows['karcher'].n_prompts} prompts"
    is_what_a_calibrated_merge_does(rows[method], family, cache, tmp_path, method=method)


def test_only_the_fit_is_refined(family: Family, cache: Path, tmp_path: Path) -> None:
    args = MergingArguments(output_dir=str(tmp_path / "c"), refine_steps=2, **FIT)
    with pytest.raises(ArgumentError, match="refines a merge that is fitted to prompts, and there are none"):
        MergeComparison(family.experts, family.texts, family.base, args=args)
    comparison = MergeComparison(
        family.experts,
        family.texts,
        family.base,
        args=args,
        methods=["linear", "regmean"],
        scales=(1.0,),
        calibration_dataset=prompts_of(family),
        cache_dir=str(cache),
    )
    comparison.run()
    with comparison.bench() as (bench, candidates):
        results = {cell.candidate.method: bench.result(cell, "test") for (cell,) in candidates}
        commands = {
            cell.candidate.method: shlex.join(
                merge_command(
                    cell, family.experts, family.base, comparison.args, "out", comparison.calibration_dataset
                )
            )
            for (cell,) in candidates
        }
    assert all(result.failure is None for result in results.values())
    assert "--refine-steps 2" in commands["karcher"] and "--calibration" in commands["karcher"]
    assert "--refine" not in commands["regmean"] and "--calibration" in commands["regmean"]
    assert "--refine" not in commands["linear"] and "calibration" not in commands["linear"]


def test_the_method_of_the_fit_is_named(family: Family) -> None:
    args = MergingArguments(output_dir="unused", method="auto")
    with pytest.raises(ArgumentError, match="method='auto' leaves the method of the fit to be chosen"):
        MergeComparison(family.experts, family.texts, family.base, args=args, calibration_dataset="self")


def test_methods_that_need_prompts_are_refused_without(family: Family) -> None:
    with pytest.raises(ArgumentError, match="method='regmean'` asks what the experts do on prompts"):
        MergeComparison(family.experts, family.texts, family.base, methods=["regmean"])


def test_the_command_names_the_prompts(family: Family, cache: Path, tmp_path: Path) -> None:
    files = {}
    for expert, rows in prompts_of(family).items():
        files[expert] = str(tmp_path / f"{Path(expert).name}.txt")
        Path(files[expert]).write_text("\n".join(rows), encoding="utf-8")
    record = compared(family, tmp_path / "c", cache, calibration_dataset=files)
    command = shlex.join(record.command)
    for expert, file in files.items():
        assert f"--calibration {expert}={file}" in command
    assert f"--num-calibration-samples {N_PROMPTS}" in command
    # A merge without a fit does not speak of prompts.
    without = compared(family, tmp_path / "d", cache, calibration_dataset=None)
    assert "calibration" not in shlex.join(without.command)


def test_a_fit_without_gain_is_no_row(family: Family, cache: Path, tmp_path: Path) -> None:
    # A merge of an expert with itself is that expert, so nothing can bring it closer.
    twin = tmp_path / "twin"
    shutil.copytree(family.experts[0], twin)
    args = MergingArguments(output_dir=str(tmp_path / "c"), **FIT)
    rows = text_of(1, 80)[40:]
    record = MergeComparison(
        [family.experts[0], str(twin)],
        family.texts,
        family.base,
        methods=["linear"],
        scales=(1.0,),
        args=args,
        calibration_dataset=rows,
        max_tokens=0,
        cache_dir=str(cache),
    ).run()
    assert [row.method for row in record.methods] == ["linear"]
    assert "came no closer" in record.failed["karcher, fitted"]


def test_what_cannot_be_fitted_is_refused_before_anything_is_run(family: Family, cache: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    with pytest.raises(ArgumentError, match=r"must not be negative with method=.karcher"):
        compared(family, tmp_path, cache, methods=["task_arithmetic"], weights=[(1.0, -0.5)], on_progress=ran.append)
    assert ran == []


def test_too_few_prompts_are_told_before_the_other_merges_are_run(family: Family, cache: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    few = {expert: rows[:4] for expert, rows in prompts_of(family).items()}  # two prompts of 32 tokens
    with pytest.raises(ArgumentError, match="Pass more prompts"):
        compared(family, tmp_path, cache, calibration_dataset=few, on_progress=ran.append)
    assert not [name for name in ran if name.startswith("linear")]
