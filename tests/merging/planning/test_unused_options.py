"""Options that change nothing are named, and those that are named change nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from merge_reference import write_family

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.merging.planning.unused_options import unused_options
from hf_frmerge.methods.table import METHODS

OTHER: dict[str, Any] = {
    "norm": "max",
    "beta": 0.5,
    "scale": 0.5,
    "density": 0.6,
    "gamma": 0.1,
    "epsilon": 0.2,
    "agreement": 0.8,
    "min_change": 0.3,
    "descent_steps": 20.0,
    "off_diagonal": 0.5,
    "fisher_labels": "exact",
    "svc_floor": 0.5,
    "tol": 0.1,
    "max_iter": 2,
    "on_ambiguous": "linear",
    "refine_loss": "jsd",
    "refine_teacher": "barycentre",
    "refine_lmbda": 0.5,
    "refine_written_samples": 8,
    "refine_beta": 0.2,
    "refine_rho": 0.1,
    "refine_learning_rate": 1e-3,
    "num_calibration_samples": 4,
    "max_calibration_length": 16,
    "calibration_batch_size": 2,
    "calibration_form": "low_rank",
    "calibration_rank": 2,
}

METHODS_OF_WEIGHTS = [
    method.name
    for method in METHODS.values()
    if method.kind in ("span", "sparse", "spectral") and not method.needs_factors and not method.is_continual
]


def test_there_is_another_value_for_every_option_that_may_be_named() -> None:
    assert {name for method in METHODS.values() for name in method.options} <= {*OTHER, "seed", "coefficients"}
    of_fits = {name for name in MergingArguments().to_dict() if name.startswith("refine_") or "calibration" in name}
    assert of_fits - {"refine_steps"} <= set(OTHER)


@pytest.mark.parametrize("method", METHODS_OF_WEIGHTS)
def test_what_is_named_changes_no_bit_of_a_merge(tmp_path: Path, method: str) -> None:
    base, experts = write_family(tmp_path)
    experts = experts[: METHODS[method].n_experts]

    def merged(name: str, **options: Any) -> bytes:
        args = MergingArguments(output_dir=str(tmp_path / name), method=method, space="deltas", **options)
        FisherRaoMerger(experts, args, base_model=base).merge()
        return (tmp_path / name / "model.safetensors").read_bytes()

    notes = unused_options(MergingArguments(method=method, **OTHER), has_prompts=False)
    unused = {
        name: other for name, other in OTHER.items() if any(f"`{name}` changes nothing" in note for note in notes)
    }
    assert {"refine_loss", "refine_rho", "calibration_rank", "off_diagonal", "svc_floor"} <= set(unused)
    assert merged("changed", **unused) == merged("plain")


def test_options_of_a_refinement_are_named_where_there_is_none() -> None:
    refining = MergingArguments(refine_steps=5, refine_loss="jsd", refine_rho=0.1, refine_beta=0.2)
    assert unused_options(refining, has_prompts=True) == []
    assert unused_options(MergingArguments(refine_rho=0.1), has_prompts=True) == [
        "`refine_rho` changes nothing without refine_steps (--refine)."
    ]
    assert unused_options(MergingArguments(refine_steps=5, refine_beta=0.2), has_prompts=True) == [
        "`refine_beta` changes nothing with refine_loss='kl'."
    ]


def test_options_of_a_fit_are_named_where_there_are_no_prompts() -> None:
    fitting = MergingArguments(num_calibration_samples=4, calibration_form="low_rank", calibration_rank=2)
    assert unused_options(fitting, has_prompts=True) == []
    assert unused_options(fitting, has_prompts=False) == [
        f"`{name}` changes nothing without prompts (--calibration)."
        for name in ("num_calibration_samples", "calibration_form", "calibration_rank")
    ]


def test_options_of_an_adapter_are_named_where_a_full_model_is_written(tmp_path: Path) -> None:
    shaped = MergingArguments(adapter_rank=4, adapter_rank_pattern="uniform")
    assert unused_options(shaped, has_prompts=False, makes_adapter=True) == []
    base, experts = write_family(tmp_path)
    plan = FisherRaoMerger(experts, shaped, base_model=base).plan()
    assert [note for note in plan.notes if "changes nothing" in note] == [
        f"`{name}` changes nothing where a full model is written." for name in ("adapter_rank", "adapter_rank_pattern")
    ]


@pytest.mark.parametrize("options", [{"method": "mats"}, {"fisher": "kfac"}])
def test_a_rank_is_named_where_nothing_of_low_rank_is_made(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    assert unused_options(MergingArguments(calibration_rank=2, **options), has_prompts=True) == [
        f"`calibration_rank` changes nothing with {name}={value!r}."
    ]


def test_options_of_what_is_asked_for_are_not_named() -> None:
    named = partial(unused_options, has_prompts=False)
    assert named(MergingArguments()) == []
    assert named(MergingArguments(fisher="diagonal", fisher_labels="exact")) == []
    assert named(MergingArguments(post_step="svc", svc_floor=0.5)) == []
    assert named(MergingArguments(fisher_labels="exact")) != []
    for method in METHODS.values():
        used = {name: OTHER.get(name, "table.safetensors") for name in method.options if name != "seed"}
        assert named(MergingArguments(method=method.name, seed=7, **used)) == [], method.name
