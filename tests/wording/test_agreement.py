"""Terminal, card and page of one evaluated merge say the same sentences and call things by the same names."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pytest
from click_runner import click_runner
from evaluation_records import make_record
from markdown_it import MarkdownIt
from merge_reference import write_family

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.cli.main import main
from hf_frmerge.cli.render.evaluation import print_evaluation
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, Score, load_record, save_record
from hf_frmerge.report.page import write_page

SENTENCES = [
    "On code it is farthest behind the best other model, perplexity 7.39 against 4.48 for expert-code.",
    "it keeps 70% of what expert-math gained on math and 50% of what expert-code gained on code over the base.",
    "Its weakest layer is 4, with 60% of the experts' activation variance and 60% of their effective rank.",
    "they differ most from those of expert-code on code, by 0.500 rad, with the same first guess for 80% of",
    "from the norm-rescaled average (the plain average stretched back to the experts' length) in any block.",
    "Two experts' deltas (differences to the base) are up to",
    "This merge keeps 100.00% of the experts' length in the median tensor",
    "Every block converged after at most",
]
TITLES = [
    "Perplexity (lower is better)",
    "Token accuracy (higher is better)",
    "How closely it predicts like the experts",
    "The objective of the merge",
    "Whether its layers still do their work",
    "Tokens on which it is farthest from an expert",
]


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def rendered(markup: str) -> str:
    """What a reader of HTML sees, on one line."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", markup, flags=re.DOTALL)
    return plain(html.unescape(re.sub(r"<[^>]+>", "", body)))


def shown(folder: Path, merge_output: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Terminal, card and page, as they are read."""
    capsys.readouterr()
    record = load_record(folder)
    assert record is not None
    print_evaluation(record)
    card = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[2]
    return {
        "terminal": plain(merge_output + capsys.readouterr().out),
        "card": rendered(MarkdownIt("commonmark").enable("table").render(card)),
        "page": rendered(write_page(folder).read_text(encoding="utf-8")),
    }


@pytest.fixture
def family(tmp_path: Path) -> tuple[str, list[str]]:
    return write_family(tmp_path / "family", 2)


def merge_and_evaluate(family: tuple[str, list[str]], folder: Path, record: EvaluationRecord) -> str:
    """Merge by the command, save the record beside it, write the card anew; returns what the command printed."""
    base, experts = family
    command = [
        "merge",
        *experts,
        "--base-model",
        base,
        "--space",
        "deltas",
        "--weights",
        "0.7,0.3",
        "--output-dir",
        str(folder),
    ]
    done = click_runner().invoke(main, command)
    assert done.exit_code == 0, done.output
    save_record(folder, record)
    from hf_frmerge.hub.card.describe import describe_merge

    describe_merge(folder)
    return done.stdout


def test_the_three_say_the_same(
    family: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = shown(tmp_path / "out", merge_and_evaluate(family, tmp_path / "out", make_record()), capsys)
    for sentence in [*SENTENCES, *TITLES]:
        assert [place for place, text in places.items() if sentence not in text] == [], sentence
    # Whole sentences with their numbers, not only what is written above: those of the weights in all three.
    for start in ("It is at most", "Two experts' deltas", "This merge keeps", "Every block converged"):
        actual = {place: re.search(rf"{start} .*?\.(?= [A-Z!✓·-]|$)", text) for place, text in places.items()}
        assert len({match and match[0].strip() for match in actual.values()}) == 1, actual
        assert None not in actual.values()


def test_the_three_name_the_same_weakest_domain(
    family: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of accuracies higher is better: x is behind by 0.12, though on y the merged model has the lowest value of all.
    rows = {"base": {"x": 0.99, "y": 0.2}, "e0": {"x": 0.9, "y": 0.25}, MERGED: {"x": 0.87, "y": 0.15}}
    models = {"base": "base", "e0": "expert", MERGED: "merged"}
    scores = [Score(model, name, {"accuracy": v}, n_samples=9) for model, of in rows.items() for name, v in of.items()]
    record = EvaluationRecord(models=models, scores=scores)  # type: ignore[arg-type]
    places = shown(tmp_path / "out", merge_and_evaluate(family, tmp_path / "out", record), capsys)
    sentence = "On x it is farthest behind the best other model, accuracy 0.870 against 0.990 for base."
    assert [place for place, text in places.items() if sentence not in text] == []


def test_the_gap_is_that_of_an_independent_mean(family: tuple[str, list[str]], tmp_path: Path) -> None:
    """Angle between merge and plain mean, from the files, as the sentence has it."""
    from safetensors.numpy import load_file

    from hf_frmerge.merging.record.manifest import read_manifest
    from hf_frmerge.wording.geometry import Geometry, geometry_verdicts

    base, experts = family
    args = MergingArguments(output_dir=str(tmp_path / "out"), space="deltas", disable_tqdm=True)
    FisherRaoMerger(experts, args, weights=[0.8, 0.2], base_model=base).merge()
    start, merged = (load_file(Path(folder) / "model.safetensors") for folder in (base, tmp_path / "out"))
    models = [load_file(Path(expert) / "model.safetensors") for expert in experts]
    gaps = []
    for name, origin in start.items():
        deltas = [model[name].astype(np.float64).ravel() - origin.astype(np.float64).ravel() for model in models]
        ours = merged[name].astype(np.float64).ravel() - origin.astype(np.float64).ravel()
        mean = 0.8 * deltas[0] + 0.2 * deltas[1]
        gaps.append(np.arccos(min(1.0, ours @ mean / np.linalg.norm(ours) / np.linalg.norm(mean))))
    (gap,) = [
        v.text for v in geometry_verdicts(Geometry.of_manifest(read_manifest(tmp_path / "out"))) if "It is" in v.text
    ]
    said = float(re.search(r"at most ([\d.]+) rad", gap)[1])  # type: ignore[index]
    assert said == pytest.approx(max(gaps), rel=0.01)
