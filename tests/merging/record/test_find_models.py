from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from merge_reference import write_family

from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.record.find_models import MergeModels, find_models, find_models_to_compare
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.run import run_merge


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A merge of `e0` and `e1`, three to one, with `base`."""
    base, experts = write_family(tmp_path / "family", 2)
    out = tmp_path / "merged"
    run_merge(build_plan(experts, MergingArguments(str(out)), [3, 1], base), StepObserver(), Processes())
    return out


def places(merged: Path) -> tuple[list[str], str]:
    family = merged.parent / "family"
    return [str(family / "e0"), str(family / "e1")], str(family / "base")


def test_models_are_where_they_were_unless_the_user_says_otherwise(merged: Path) -> None:
    experts, base = places(merged)
    manifest = read_manifest(merged)
    assert find_models(merged, manifest, option="--x") == MergeModels(experts, [0.75, 0.25], base)
    chosen = find_models(merged, manifest, [None, "org/e1@v1", "org/base"], option="--x")
    assert chosen == MergeModels([experts[0], "org/e1@v1"], [0.75, 0.25], "org/base")
    (merged / ".frmerge_sources.json").unlink()
    with pytest.raises(CheckpointError, match=r"not known on this machine: e0, base\. Say where they are with --x\."):
        find_models(merged, manifest, [None, "org/e1"], option="--x")


def test_models_of_the_hub_are_found_at_the_commit_that_was_merged(merged: Path) -> None:
    experts, base = places(merged)
    manifest = read_manifest(merged)
    first, second = manifest.experts
    pinned = replace(second, id="org/e1", on_hub=True, commit="f" * 40)
    actual = find_models(merged, replace(manifest, experts=(first, pinned)), option="--x")
    assert actual == MergeModels([experts[0], "org/e1@" + "f" * 40], [0.75, 0.25], base)


def test_a_merge_is_compared_with_its_experts_or_with_others(merged: Path, tmp_path: Path) -> None:
    experts, base = places(merged)
    assert find_models_to_compare(merged) == MergeModels(experts, [0.75, 0.25], base)
    assert find_models_to_compare(merged, base_model="org/base").base_model == "org/base"
    moved = [shutil.copytree(expert, tmp_path / "moved" / Path(expert).name) for expert in experts]
    named = [str(path) for path in moved]
    assert find_models_to_compare(merged, named) == MergeModels(named, [0.75, 0.25], base)
    assert find_models_to_compare(merged, named[::-1]).weights is None, "in another order they are other models"
    assert find_models_to_compare(merged, ["org/other"]) == MergeModels(["org/other"], None, base)
    assert find_models_to_compare(experts[0], ["org/a"], "org/b") == MergeModels(["org/a"], None, "org/b")
    (merged / ".frmerge_sources.json").unlink()
    with pytest.raises(ArgumentError, match=r"does not say where 'e0' is on this machine: give --experts"):
        find_models_to_compare(merged)
    assert find_models_to_compare(merged, named) == MergeModels(named, [0.75, 0.25], None)
