"""The axes of the paper on tiny experts: what is run, and how well a lead is known."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from comparison_family import Family, family  # noqa: F401  # the fixture needs the name

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import paper_report
    import reproduce_paper

    for module in ("paper_report", "reproduce_paper", "small_models"):
        monkeypatch.delitem(sys.modules, module)
    return reproduce_paper, paper_report


@pytest.fixture
def experts(family: Family, tmp_path: Path) -> Path:  # noqa: F811
    """Full experts and adapters of two domains, as `train_experts.py` lays them out, and a base of the size 1m."""
    root = tmp_path / "experts"
    shutil.copytree(family.base, root / "1m" / "base")
    (root / "texts").mkdir()
    for name, rows in family.texts.items():
        for suite, folder in (("1m", name), ("full", name), ("lora", f"{name}-lora")):
            shutil.copytree(Path(family.base).parent / folder, root / suite / name)
        (root / "texts" / f"{name}.test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (root / "demo" / "experts").mkdir(parents=True)
    return root


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, workdir: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", "--workdir", str(workdir), *arguments])
    module.main()


def test_experts_with_a_base_of_their_own_are_compared_and_reported(
    scripts: tuple[ModuleType, ModuleType],
    experts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reproduce_paper, paper_report = scripts
    options = ["--experts", str(experts), "--family", "1m", "--numbers", "2", "--seeds", "1", "2", "--tokens", "0"]
    methods = ["karcher", "nre", "linear", "ties", "karcher,space=weights"]
    run(reproduce_paper, monkeypatch, tmp_path / "runs", *options, "--methods", *methods, "--scales", "1", "2")
    picture = tmp_path / "axes.png"
    run(reproduce_paper, monkeypatch, tmp_path / "runs", "--report", "--figure", str(picture))
    report = capsys.readouterr().out
    assert "### 1m" in report and "| karcher space=weights | 2 | " in report
    assert picture.stat().st_size > 10_000

    runs = paper_report.read_runs(tmp_path / "runs")
    assert [(one.family, one.number, one.seed) for one in runs] == [("1m", 2, 1), ("1m", 2, 2)]
    for one in runs:
        record = json.loads((tmp_path / "runs" / f"1m-2-{one.seed}" / "comparison.json").read_text())
        best = record["methods"][0]
        for row in record["methods"][1:]:
            # The comparison's own bootstrap tells the leads of the best over the others.
            monkeypatch.setattr(paper_report, "FIRST", best["label"])
            lead = paper_report.lead_of([one], row["label"])
            assert lead.mean == pytest.approx(100 * row["lead"], abs=1e-9)
            width = 100 * (row["lead_interval"][1] - row["lead_interval"][0])
            assert lead.interval == pytest.approx([100 * end for end in row["lead_interval"]], abs=0.15 * width)


def test_full_experts_and_adapters_of_a_domain_each_have_their_own_gain(
    scripts: tuple[ModuleType, ModuleType], experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce_paper, paper_report = scripts
    monkeypatch.setattr(reproduce_paper, "DEMO_DATA", experts / "demo")
    monkeypatch.setattr(reproduce_paper, "find_base", lambda root, _family: root / "1m" / "base")
    options = ["--experts", str(experts), "--family", "mixed", "--numbers", "4", "--seeds", "1", "--tokens", "0"]
    run(reproduce_paper, monkeypatch, tmp_path / "runs", *options, "--methods", "karcher", "nre", "--scales", "1")
    (one,) = paper_report.read_runs(tmp_path / "runs")
    assert {name: domain for name, (domain, _) in one.gains.items()} == {
        "red": "red",
        "red-2": "red",
        "blue": "blue",
        "blue-2": "blue",
    }
    assert len({gain for _, gain in one.gains.values()}) == 4
    leads = paper_report.resampled_lead(one, "nre", np.random.default_rng(0))
    lead = 100 * (one.methods["karcher"]["score"] - one.methods["nre"]["score"])
    assert leads.mean() == pytest.approx(lead, abs=4 * leads.std() / np.sqrt(len(leads)) + 0.05)


def test_the_error_of_a_lead_is_that_of_a_mean_over_texts(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, paper_report = scripts
    draw = np.random.default_rng(3)
    n_texts, n_tokens, gain = 400, 50, 0.5
    counts = np.full(n_texts, n_tokens)
    better = draw.normal(100.0, 20.0, n_texts)
    worse = better + draw.normal(1.0, 3.0, n_texts)

    def run_of(worse: np.ndarray) -> object:
        losses = {"karcher": {"a": (better, counts)}, "nre": {"a": (worse, counts)}}
        methods = {
            label: {"score": -sums.sum() / counts.sum() / gain}
            for label, ((sums, _),) in ((label, tuple(domains.values())) for label, domains in losses.items())
        }
        return paper_report.Run("full", 2, 1, methods, losses, {"a": ("a", gain)}, 90.0, 1.0)

    lead = paper_report.lead_of([run_of(worse)], "nre")
    per_text = 100 * (worse - better) / n_tokens / gain
    assert lead.mean == pytest.approx(per_text.mean())
    expected = per_text.std() / np.sqrt(n_texts)
    assert lead.error == pytest.approx(expected, rel=0.1)
    assert lead.interval == pytest.approx([lead.mean - 1.96 * expected, lead.mean + 1.96 * expected], abs=expected / 4)

    # Where texts agree and runs do not, all of the interval comes from the runs.
    two = paper_report.lead_of([run_of(better + 1.0), run_of(better + 3.0)], "nre")
    assert two.error == pytest.approx(0.0, abs=1e-9)
    assert two.interval == pytest.approx([100 * 1.0 / n_tokens / gain, 100 * 3.0 / n_tokens / gain])
    assert two.n_ahead == 2
