"""A method is described once: a new one is a function and an entry of the table, and the rest of the house follows."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pytest
from merge_reference import SHAPES, write_family
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
from hf_frmerge.methods.table import METHODS
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
    assert f"[{'|'.join(METHODS)}]" in help_text
    assert "task_arithmetic, ties" in help_text  # what obeys --scale
    with pytest.raises(ArgumentError, match=rf"expected one of {', '.join(METHODS)}\."):
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
