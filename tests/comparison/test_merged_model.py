"""A merge in memory is, bit for bit, what `frmerge merge` writes, whatever was merged before in the same memory."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from comparison_family import WORDS, Family
from safetensors.torch import load_file
from tiny_models import save_classifier_family
from transformers import AutoModelForCausalLM, BertForSequenceClassification

from hf_frmerge.comparison.candidates import Cell, arguments_of, default_candidates, parse_candidate
from hf_frmerge.comparison.merged_model import MergedModel
from hf_frmerge.comparison.shared_rules import SharedGrams
from hf_frmerge.errors import MergeError
from hf_frmerge.kernels.interface import Kernels
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.decisions import Decided
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.engine.tensor_stack import TensorStack
from hf_frmerge.merging.engine.tensor_work import TensorWork
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.plan import MergePlan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.methods.spectral.decision import Spectral
from hf_frmerge.methods.table import METHODS

CELLS = [
    Cell(candidate, scale, weights)
    for candidate in default_candidates(2, has_base=True)
    for scale, weights in ((1.0, None), (1.4, None), (0.5, (0.7, 0.3)))
]
CELLS += [
    Cell(parse_candidate("karcher,space=weights"), None, None),
    Cell(parse_candidate("karcher,block=row"), 1.4, None),
    Cell(parse_candidate("nre,block=layer"), 1.4, None),
    Cell(parse_candidate("linear,space=weights"), None, (0.2, 0.8)),
    Cell(parse_candidate("ties,density=0.5"), 2.0, None),
]


def plan_of(cell: Cell, experts: list[str], base: str, folder: Path) -> MergePlan:
    args = MergingArguments(output_dir=str(folder), adapter_output="merged", **arguments_of(cell))
    return build_plan(experts, args, cell.weights, base)


def written(cell: Cell, experts: list[str], base: str, folder: Path) -> dict[str, torch.Tensor]:
    with closing(plan_of(cell, experts, base, folder)) as plan:
        run_merge(plan, StepObserver(), Processes())
    return load_file(folder / "model.safetensors")


def merged_model(experts: list[str], base: str, root: Path) -> MergedModel:
    (root / "scratch").mkdir()
    with closing(plan_of(CELLS[0], experts, base, root / "none")) as plan:
        return MergedModel(plan, "auto", root / "scratch")


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_memory_has_the_bits_of_the_file(family: Family, tmp_path: Path, kind: str) -> None:
    experts = family.experts if kind == "full" else family.adapters
    merged = merged_model(experts, family.base, tmp_path)
    for number, cell in enumerate(CELLS):
        with closing(plan_of(cell, experts, family.base, tmp_path / "none")) as plan:
            merged.merge(plan, cell)
        assert_same(merged.tensors(), written(cell, experts, family.base, tmp_path / str(number)))
    assert not (tmp_path / "none").exists()


def test_the_model_is_the_one_that_is_loaded_from_the_file(family: Family, tmp_path: Path) -> None:
    merged = merged_model(family.experts, family.base, tmp_path)
    tokens = torch.arange(1, 30)[None]
    for number, cell in enumerate(CELLS[:4]):
        with closing(plan_of(cell, family.experts, family.base, tmp_path / "none")) as plan:
            merged.merge(plan, cell)
        model = merged.model().eval()
        written(cell, family.experts, family.base, tmp_path / str(number))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), dtype="auto").eval()
        assert model.dtype == loaded.dtype and type(model) is type(loaded)
        with torch.inference_mode():
            assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_a_model_in_another_dtype_is_loaded_again_for_every_merge(family: Family, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with closing(plan_of(CELLS[0], family.experts, family.base, tmp_path / "none")) as plan:
        merged = MergedModel(plan, "float64", tmp_path / "scratch")
        merged.merge(plan, CELLS[0])
    before = merged.model().model.norm.weight.clone()
    assert before.dtype == torch.float64
    with closing(plan_of(CELLS[1], family.experts, family.base, tmp_path / "none")) as plan:
        merged.merge(plan, CELLS[1])
    assert torch.equal(merged.model().model.norm.weight, merged.tensors()["model.norm.weight"].double())
    assert not torch.equal(merged.model().model.norm.weight, before)


def test_classifiers_keep_their_heads(tmp_path: Path) -> None:
    save_classifier_family(tmp_path, WORDS, 0.3)
    experts, base = [str(tmp_path / name) for name in ("math", "code")], str(tmp_path / "base")
    merged = merged_model(experts, base, tmp_path)
    with closing(plan_of(CELLS[0], experts, base, tmp_path / "none")) as plan:
        merged.merge(plan, CELLS[0])
    expected = written(CELLS[0], experts, base, tmp_path / "written")
    assert_same(merged.tensors(), expected)
    assert isinstance(merged.model(), BertForSequenceClassification)
    assert torch.equal(merged.model().classifier.weight, expected["classifier.weight"])


def test_experts_are_measured_once_for_all_span_methods(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    measure = SharedGrams.measure

    def note(rule: SharedGrams, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        measured.extend(each.step.name for each in (tensor.tensors if isinstance(tensor, TensorStack) else [tensor]))
        measure(rule, kernels, tensor, index)

    monkeypatch.setattr(SharedGrams, "measure", note)
    merged = merged_model(family.experts, family.base, tmp_path)
    for cell in CELLS:
        if METHODS[cell.candidate.method].kind == "span" and not cell.candidate.options:
            with closing(plan_of(cell, family.experts, family.base, tmp_path / "none")) as plan:
                merged.merge(plan, cell)
    with closing(plan_of(CELLS[0], family.experts, family.base, tmp_path / "none")) as plan:
        assert sorted(measured) == sorted(step.name for step in plan.steps if step.action == "merge")


def test_what_a_merge_that_failed_did_not_measure_is_measured_by_the_next(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = merged_model(family.experts, family.base, tmp_path)
    decide, decided = SharedGrams.decide, []

    def fail(rule: SharedGrams, tensors: list[TensorWork]) -> dict[str, Decided]:
        if decided:
            raise MergeError("the experts balance out")
        decided.append(tensors)
        return decide(rule, tensors[:1])

    with (
        closing(plan_of(CELLS[0], family.experts, family.base, tmp_path / "none")) as plan,
        monkeypatch.context() as patch,
        pytest.raises((MergeError, KeyError)),
    ):
        patch.setattr(SharedGrams, "decide", fail)
        merged.merge(plan, CELLS[0])
    with closing(plan_of(CELLS[0], family.experts, family.base, tmp_path / "none")) as plan:
        merged.merge(plan, CELLS[0])
    assert_same(merged.tensors(), written(CELLS[0], family.experts, family.base, tmp_path / "written"))


def test_a_matrix_is_merged_once_for_all_scales(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = []
    merge = Spectral.merge
    monkeypatch.setattr(Spectral, "merge", lambda decision, deltas: merges.append(1) or merge(decision, deltas))
    merged = merged_model(family.experts, family.base, tmp_path)
    counts = []
    for name, scale in (("tsv_m", 1.0), ("tsv_m", 0.5), ("iso_c", 1.0), ("iso_c", 2.0)):
        cell = Cell(parse_candidate(name), scale, None)
        with closing(plan_of(cell, family.experts, family.base, tmp_path / "none")) as plan:
            merged.merge(plan, cell)
            n_matrices = sum(step.is_matrix for step in plan.steps)
        counts.append(len(merges))
    assert counts == [n_matrices, n_matrices, 2 * n_matrices, 2 * n_matrices]
