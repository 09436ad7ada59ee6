"""What is compared, and with which scales and weights."""

from __future__ import annotations

import pytest

from hf_frmerge.comparison.candidates import (
    Candidate,
    Cell,
    arguments_of,
    cells_of,
    default_candidates,
    parse_candidate,
    with_seeds,
)
from hf_frmerge.errors import ArgumentError
from hf_frmerge.methods.table import METHODS


def names(**facts) -> list[str]:
    return [one.method for one in default_candidates(facts.pop("n_experts", 3), **facts)]


def test_default_methods_are_those_that_can_run() -> None:
    full = names(has_base=True)
    assert {"linear", "task_arithmetic", "karcher", "nre", "ties", "dare_ties", "tsv_m", "iso_c"} <= set(full)
    assert 9 <= len(full) <= 12 and "nuslerp" not in full
    assert "nuslerp" in names(n_experts=2, has_base=True)
    assert all(not METHODS[name].needs_deltas for name in names(has_base=False))


def test_every_method_gets_the_same_scales() -> None:
    for candidate in default_candidates(3, has_base=True):
        cells = cells_of(candidate, [0.5, 2.0], [None, (0.7, 0.2, 0.1)], has_base=True)
        assert [(cell.scale, cell.weights) for cell in cells] == [
            (0.5, None), (2.0, None), (0.5, (0.7, 0.2, 0.1)), (2.0, (0.7, 0.2, 0.1)),
        ]  # fmt: skip
        assert arguments_of(cells[0]) == {"method": candidate.method, "space": "deltas", "scale": 0.5}


def test_weights_are_not_scaled() -> None:
    for candidate, has_base in ((parse_candidate("karcher,space=weights"), True), (Candidate("karcher"), False)):
        (cell,) = cells_of(candidate, [0.5, 2.0], [None], has_base=has_base)
        assert cell.scale is None and "scale" not in arguments_of(cell)


def test_a_method_is_read_with_its_options() -> None:
    candidate = parse_candidate("della,density=0.5,epsilon=0.1")
    assert (candidate.method, candidate.label) == ("della", "della density=0.5 epsilon=0.1")
    assert arguments_of(Cell(candidate, 1.0, None)) == {
        "method": "della", "space": "deltas", "scale": 1.0, "density": "0.5", "epsilon": "0.1",
    }  # fmt: skip


def test_methods_that_draw_are_repeated_with_the_seeds_that_follow() -> None:
    cell = Cell(parse_candidate("dare_ties,density=0.3"), 1.4, None)
    first, *others = with_seeds(cell, 3, 42)
    assert first is cell
    assert [arguments_of(other) for other in others] == [{**arguments_of(cell), "seed": seed} for seed in ("43", "44")]
    own = with_seeds(Cell(parse_candidate("della,seed=7"), None, None), 2, 42)
    assert [arguments_of(one)["seed"] for one in own] == ["7", "8"]
    assert with_seeds(Cell(parse_candidate("ties"), 1.0, None), 3, 42) == [Cell(Candidate("ties"), 1.0, None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("karchr", "no method 'karchr'.*Did you mean 'karcher'"),
        ("given", "no method 'given'"),
        (
            "ties,gamma=0.1",
            "an option of ties .density, space, block, post_step, svc_floor, layer_scales., but got 'gamma=0.1'",
        ),
        ("ties,scale=2", "same scales"),
        ("ties,density", "but got 'density'"),
    ],
)
def test_what_is_no_method_or_no_option_is_refused(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_candidate(text)
