"""A method is described once: a new one is a function and an entry of the table, and the rest of the house follows."""

from __future__ import annotations

import re
from pathlib import Path

import click
import numpy as np
import pytest
from merge_reference import SHAPES, merged_reference, write_family, write_model
from numpy.typing import ArrayLike
from safetensors.torch import load_file

from hf_frmerge.cli import merge as merge_command
from hf_frmerge.errors import ArgumentError
from hf_frmerge.geometry.sphere import Array
from hf_frmerge.hub.card.describe import describe_merge
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.methods import span
from hf_frmerge.methods.method import Method
from hf_frmerge.methods.span import SpanOptions, SpanResult
from hf_frmerge.methods.table import CHOICES, METHODS
from hf_frmerge.provenance.verify import verify
from hf_frmerge.report.page import write_page


def halves(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    """Half of the plain mean."""
    plain = span.linear(points, weights, options)
    return SpanResult(plain.coefficients / 2, plain.n_iter, plain.residual, plain.converged, plain.ambiguous)


@pytest.fixture
def with_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span, "halves", halves, raising=False)
    monkeypatch.setitem(
        METHODS, "halves", Method("halves", "span", "half an average", "it is halved.", "It is small.")
    )


@pytest.mark.usefixtures("with_halves")
def test_a_function_and_an_entry_are_a_method(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path)
    args = MergingArguments(output_dir=str(tmp_path / "out"), method="halves")
    run_merge(build_plan(experts, args), StepObserver(), Processes())
    models = [load_file(Path(folder) / "model.safetensors") for folder in experts]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        expected = sum(model[name].double() for model in models) / 6
        np.testing.assert_allclose(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert verify(str(tmp_path / "out")).problems == []
    assert "half an average" in describe_merge(tmp_path / "out").read_text()
    assert "half an average" in write_page(tmp_path / "out").read_text()


def test_choices_and_help_are_those_of_the_table() -> None:
    help_text = " ".join(merge_command.merge.get_help(click.Context(merge_command.merge, terminal_width=2000)).split())
    assert f"[{'|'.join(CHOICES)}]" in help_text
    assert "(dare_linear, dare_ties, della)" in help_text  # what obeys --seed
    # The help of --scale says so.
    assert all("scale" in method.options for method in METHODS.values() if method.kind != "given")
    with pytest.raises(ArgumentError, match=re.escape(f"expected one of {', '.join(CHOICES)}.")):
        MergingArguments(method="none-of-them")


@pytest.mark.parametrize("name", METHODS)
def test_an_entry_is_whole(name: str) -> None:
    method = METHODS[name]
    assert method.name == name and method.title and method.how.endswith(".") and method.why.endswith(".")
    known = set(MergingArguments.__dataclass_fields__)
    assert set(method.options) <= known
    assert (method.n_experts is None) == (method.extension is None)
    if method.kind == "span":
        assert method.solver().__name__ == name


@pytest.mark.parametrize("block", ["tensor", "row"])
@pytest.mark.parametrize("name", [method.name for method in METHODS.values() if method.kind == "span"])
def test_a_span_method_is_its_formula_on_full_vectors(name: str, block: str, tmp_path: Path) -> None:
    weights = [0.6, 0.4] if METHODS[name].n_experts == 2 else [0.4, 0.35, 0.25]
    base, experts = write_family(tmp_path, len(weights))
    args = MergingArguments(output_dir=str(tmp_path / "out"), method=name, block=block, space="deltas")
    run_merge(build_plan(experts, args, weights, base), StepObserver(), Processes())
    sources = [load_file(Path(folder) / "model.safetensors") for folder in experts]
    origin, merged = (load_file(path / "model.safetensors") for path in (tmp_path / "base", tmp_path / "out"))
    for tensor, shape in SHAPES.items():
        n_blocks = shape[0] if block == "row" and len(shape) > 1 else 1
        expected = merged_reference(name, [source[tensor] for source in sources], weights, origin[tensor], n_blocks)
        np.testing.assert_allclose(merged[tensor].double(), expected, rtol=1e-6, atol=1e-6)
    assert verify(str(tmp_path / "out")).problems == []


def test_where_model_stock_keeps_the_base_the_report_says_so(tmp_path: Path) -> None:
    base, _ = write_family(tmp_path, 2)
    origin = load_file(Path(base) / "model.safetensors")
    experts = [
        write_model(tmp_path / f"opposed{sign}", {name: tensor + sign * tensor for name, tensor in origin.items()})
        for sign in (-0.5, 0.5)
    ]
    args = MergingArguments(output_dir=str(tmp_path / "out"), method="model_stock")
    report = run_merge(build_plan(experts, args, base_model=base), StepObserver(), Processes()).report
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(bool((merged[name] == origin[name]).all()) for name in SHAPES)
    [note] = [note for note in report.notes if "base model" in note]
    assert note.startswith(f"The merged model is the base model in {len(SHAPES)} of {len(SHAPES)} tensors")
