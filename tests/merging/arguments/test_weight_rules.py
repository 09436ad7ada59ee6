from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.weight_rules import WeightSchedule, layer_index

HALF = [0.5, 0.5]


def schedule(*rules: str, n_experts: int = 2) -> WeightSchedule:
    return WeightSchedule.parse(rules, [1 / n_experts] * n_experts, n_experts)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.11.mlp.experts.3.w1.weight", 11),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", 0),
        ("transformer.h.7.ln_1.weight", 7),
        ("3.weight", 3),
        ("layers.4", 4),
        ("lm_head.weight", None),
        ("model.ln_1.weight", None),
        ("model.layer12.weight", None),
    ],
)
def test_layer_index_is_the_first_part_that_is_a_number(name: str, index: int | None) -> None:
    assert layer_index(name) == index


def test_first_rule_that_matches_wins_and_others_get_the_default() -> None:
    rules = schedule(r"layers\.0\.=3,1", r"mlp=1,0", r"layers\.0\.mlp=0,1", r"a=b=0,2")
    assert rules.weights_for("model.layers.0.mlp.w", 4) == [0.75, 0.25]
    assert rules.weights_for("model.layers.1.mlp.w", 4) == [1.0, 0.0]
    assert rules.weights_for("model.embed", 4) == HALF
    assert rules.weights_for("x.a=b", 4) == [0.0, 1.0]  # split at the last "="
    assert rules.unused_rules(["model.layers.0.mlp.w", "model.layers.1.mlp.w", "norm"]) == [
        r"layers\.0\.mlp=0,1",  # the first rule takes what it matches
        r"a=b=0,2",
    ]


def test_default_weights_are_kept_to_the_last_digit() -> None:
    thirds = [0.1 / 0.7, 0.2 / 0.7, 0.4 / 0.7]
    assert WeightSchedule.parse([], thirds, 3).weights_for("w", 1) == thirds


@given(
    anchors=st.lists(st.integers(0, 8).map(lambda i: i / 8), min_size=2, max_size=6),
    n_layers=st.integers(2, 40),
    data=st.data(),
)
def test_gradients_are_straight_lines_between_their_anchors(
    anchors: list[float], n_layers: int, data: st.DataObject
) -> None:
    layer = data.draw(st.integers(0, n_layers - 1))
    rule = f"layers={':'.join(map(str, anchors))},1"
    reference = np.interp(layer / (n_layers - 1), np.linspace(0, 1, len(anchors)), anchors)
    got = schedule(rule).weights_for(f"layers.{layer}.w", n_layers)
    np.testing.assert_allclose(got, np.array([reference, 1]) / (reference + 1), atol=1e-14)


def test_gradient_meets_its_anchors_exactly() -> None:
    rules = schedule("layers=0:0.3:1,1:0.1:0")
    assert rules.weights_for("layers.0.w", 31) == [0.0, 1.0]
    assert rules.weights_for("layers.15.w", 31) == [0.3 / 0.4, 0.1 / 0.4]
    assert rules.weights_for("layers.30.w", 31) == [1.0, 0.0]
    assert rules.weights_for("layers.0.w", 1) == [0.0, 1.0]


def test_gradient_does_not_apply_outside_the_layers() -> None:
    rules = schedule("weight=0:1,1:0", "head=3,1")
    assert rules.weights_for("lm_head.weight", 5) == [0.75, 0.25]
    assert rules.weights_for("embed.weight", 5) == HALF
    assert rules.unused_rules(["lm_head.weight", "embed.weight"]) == ["weight=0:1,1:0"]
    # The gradient of one expert makes the whole rule one of layers.
    assert schedule("weight=0:1,1").weights_for("embed.weight", 5) == HALF


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("0.5,0.5", "must read REGEX=w1,w2"),
        ("=0.5,0.5", "must read REGEX=w1,w2"),
        ("layers.(=1,0", "'layers.\\(' is not a regular expression"),
        ("mlp=1", "Weight rule 'mlp=1': .*got 1 .* for 2 experts"),
        ("mlp=1,2,3", "got 3"),
        ("mlp=1,x", "separated by commas; but got '1,x'"),
        ("mlp=1,", "separated by commas; but got '1,'"),
        ("mlp=1,0:", "separated by commas; but got '1,0:'"),
        ("mlp=1,-1", "weight of expert 2 is -1"),
        ("mlp=1,0:-1:4", "weight of expert 2 is -1"),
        ("mlp=nan:1,1", "weight of expert 1 is nan"),
        ("mlp=1:inf,1", "weight of expert 1 is inf"),
        ("mlp=0,0", "all zero"),
        ("mlp=0:0,0", "all zero"),
    ],
)
def test_bad_rules_are_refused_with_their_text(rule: str, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        schedule("fine=1,0", rule)


def test_gradient_that_weighs_no_expert_somewhere_names_the_tensor() -> None:
    rules = schedule("layers=1:0,1:0")
    assert rules.weights_for("layers.1.w", 3) == HALF
    with pytest.raises(ArgumentError, match=r"Weight rule 'layers=1:0,1:0' at 'layers.2.w': .*all zero"):
        rules.weights_for("layers.2.w", 3)
