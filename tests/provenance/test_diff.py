"""What `diff_merges` says about two merges is what was done differently, no more and no less."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click_runner import click_runner
from evaluation_records import make_record
from hub_server import HubServer
from merge_reference import SHAPES, random_model, write_family, write_model
from safetensors.numpy import load_file

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.cli.main import main
from hf_frmerge.evaluation.record import save_record
from hf_frmerge.provenance.diff import Change, diff_merges

HEAD = "lm_head.weight"


def merge(
    experts: list[str], out: Path, weights: list[float] | None = None, base: str | None = None, **options: Any
) -> str:
    FisherRaoMerger(
        experts, MergingArguments(output_dir=str(out), disable_tqdm=True, **options), weights, base
    ).merge()
    return str(out)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    return write_family(tmp_path_factory.mktemp("family"))


def test_the_same_merge_twice(family: tuple[str, list[str]], tmp_path: Path) -> None:
    experts = family[1]
    actual = diff_merges(merge(experts, tmp_path / "a"), merge(experts, tmp_path / "b", run_name="b", num_workers=1))
    assert actual.same_model and actual.n_tensors == len(SHAPES)
    assert actual.sources == actual.arguments == actual.files == actual.evaluation == []
    assert [change.what for change in actual.running] == ["num_workers", "run_name"]
    assert actual.coefficients is None and actual.n_coefficients == 0


def test_other_weights_and_options(family: tuple[str, list[str]], tmp_path: Path) -> None:
    experts = family[1][:2]
    a = merge(experts, tmp_path / "a", [0.5, 0.5])
    b = merge(experts, tmp_path / "b", [0.75, 0.25], method="linear", dtype="float16")
    actual = diff_merges(a, b)
    assert not actual.same_model and len(actual.different_tensors) == len(SHAPES)
    assert actual.sources == [Change("e0: weight", 0.5, 0.75), Change("e1: weight", 0.5, 0.25)]
    # `method` is an argument and a fact of its own in the manifest: it is told once.
    assert sorted((change.what, change.a, change.b) for change in actual.arguments) == [
        ("dtype", "auto", "float16"),
        ("method", "karcher", "linear"),
    ]
    tables = [load_file(Path(folder) / "merge_coefficients.safetensors") for folder in (a, b)]
    gaps = {name: np.abs(tables[0][name] - tables[1][name]) for name in tables[0]}
    worst = max(gaps, key=lambda name: gaps[name].max())
    assert actual.n_coefficients == len(SHAPES) and actual.coefficients is not None
    assert actual.coefficients.tensor == worst
    assert abs(actual.coefficients.a - actual.coefficients.b) == gaps[worst].max()
    assert actual.coefficients.expert == f"e{gaps[worst].argmax()}"


def test_one_tensor_alone(family: tuple[str, list[str]], tmp_path: Path) -> None:
    experts = family[1][:2]
    a = merge(experts, tmp_path / "a", block="row")
    b = merge(experts, tmp_path / "b", block="row", weight_rules=[f"^{HEAD}$=1,0"])
    actual = diff_merges(a, b)
    assert actual.different_tensors == [HEAD] and actual.n_coefficients == 1
    assert actual.coefficients is not None and actual.coefficients.tensor == HEAD
    rows = [load_file(Path(folder) / "merge_coefficients.safetensors")[HEAD] for folder in (a, b)]
    block, column = np.unravel_index(np.abs(rows[0] - rows[1]).argmax(), rows[0].shape)
    assert (actual.coefficients.block, actual.coefficients.a) == (block, rows[0][block, column])
    assert [change.what for change in actual.files] == ["merge_coefficients.safetensors"]


def test_thresholds_of_trimmed_merges(family: tuple[str, list[str]], tmp_path: Path) -> None:
    base, experts = family
    few, many, louder, turned = (
        merge(models, tmp_path / name, base=base, method="ties", **options)
        for name, models, options in (
            ("few", experts, {"density": 0.2}),
            ("many", experts, {"density": 0.5}),
            ("louder", experts, {"density": 0.2, "scale": 0.7}),
            ("turned", experts[::-1], {"density": 0.2}),
        )
    )
    origin, *models = (load_file(Path(folder) / "model.safetensors") for folder in [base, *experts])

    def threshold(model: dict[str, Any], name: str, density: float) -> float:
        magnitudes = np.sort(np.abs(model[name].astype(np.float64) - origin[name]).astype(np.float32).ravel())
        return float(magnitudes[-max(1, int(density * magnitudes.size))])

    changed = [name for name in SHAPES if any(threshold(m, name, 0.2) != threshold(m, name, 0.5) for m in models)]
    actual = diff_merges(few, many)
    assert actual.n_thresholds == len(changed) == len(SHAPES) and actual.n_coefficients == 0
    actual = diff_merges(few, louder)
    assert actual.n_thresholds == 0 and len(actual.different_tensors) == len(SHAPES)
    assert diff_merges(few, turned).n_thresholds == 0  # experts are matched by name
    assert diff_merges(few, merge(experts, tmp_path / "mean", base=base)).n_thresholds == 0  # nothing to compare
    done = click_runner().invoke(main, ["diff", few, many])
    assert f"Thresholds differ in {len(SHAPES)} tensors." in done.output


def test_experts_in_another_order_and_another_expert(family: tuple[str, list[str]], tmp_path: Path) -> None:
    one, two, three = family[1]
    a = merge([one, two], tmp_path / "a", [0.75, 0.25], method="linear")
    b = merge([two, one], tmp_path / "b", [0.25, 0.75], method="linear")
    actual = diff_merges(a, b)
    assert actual.sources == [] and actual.coefficients is None, "experts are matched by name"
    c = merge([one, three], tmp_path / "c", [0.75, 0.25], method="linear")
    actual = diff_merges(a, c)
    assert actual.sources == [Change("e1", "expert", None), Change("e2", None, "expert")]
    assert actual.coefficients is None and actual.different_tensors


def test_a_local_expert_that_was_trained_on(tmp_path: Path) -> None:
    _, (first, second) = write_family(tmp_path, 2)
    a = merge([first, second], tmp_path / "a")
    write_model(Path(second), random_model(9))
    b = merge([first, second], tmp_path / "b")
    (change,) = diff_merges(a, b).sources
    assert change.what == "e1: model.safetensors" and change.a != change.b


def test_merges_on_the_hub_by_their_records_alone(hub: HubServer, tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    for folder in experts:
        hub.add_repo(f"ann/{Path(folder).name}", {path.name: path.read_bytes() for path in Path(folder).iterdir()})
    out = Path(merge(["ann/e0", "ann/e1"], tmp_path / "a"))
    save_record(out, make_record())
    hub.add_repo("ann/merged", {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith(".")})
    repo = hub.repos["models", "ann/e0"]
    old = repo.commit_of("main")
    repo.branches["main"] = repo.add_commit(old, "Say hello", dict(old.files)).oid
    other = Path(merge(["ann/e0", "ann/e1"], tmp_path / "b"))
    record = make_record()
    record.scores[-1].metrics["loss"] += 0.5
    save_record(other, record)
    hub.requests.clear()
    actual = diff_merges("ann/merged", str(other))
    assert actual.same_model and actual.sources == [Change("ann/e0: commit", old.oid, repo.branches["main"])]
    (change,) = actual.evaluation
    assert change.what == "code: loss" and change.b - change.a == pytest.approx(0.5)
    assert not any("model.safetensors" in request.path for request in hub.requests)


def test_what_one_of_them_lacks(family: tuple[str, list[str]], tmp_path: Path) -> None:
    a, b = (merge(family[1], tmp_path / name) for name in "ab")
    manifest = json.loads((tmp_path / "b" / "merge_manifest.json").read_text())
    del manifest["tensors"][HEAD], manifest["files"]["config.json"]
    (tmp_path / "b" / "merge_manifest.json").write_text(json.dumps(manifest))
    actual = diff_merges(a, b)
    assert (actual.only_a, actual.only_b, actual.same_model) == ([HEAD], [], False)
    assert [change.what for change in actual.files] == ["config.json"]
