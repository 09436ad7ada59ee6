"""The verdict on an inspection, from numbers made by hand."""

from __future__ import annotations

import pytest

from hf_frmerge.merging.inspection import Inspection, SpaceView, TensorView
from hf_frmerge.wording.inspection import inspection_verdict


def view(norm: float, gap: float) -> SpaceView:
    return SpaceView((norm, norm), max_angle=0.5, mean_angle=0.25, karcher_nre_gap=gap, linear_norm_ratio=0.9)


def inspected(weights: SpaceView, deltas: SpaceView | None) -> Inspection:
    tensor = TensorView("w", (2, 3), weights, deltas)
    return Inspection(["a", "b"], [tensor], tensor)


@pytest.mark.parametrize(("gap", "shift", "is_one_model"), [(0.1, "0.001", True), (0.2, "0.002", False)])
def test_a_gap_between_deltas_counts_by_their_share_of_the_weights(gap: float, shift: str, is_one_model: bool) -> None:
    """Deltas of norm 1 in weights of norm 100: rounding to bf16 turns a tensor by 0.0015 rad."""
    verdict = inspection_verdict(inspected(view(100, 1e-5), view(1, gap)))
    in_weights, in_deltas = verdict.split(" In delta space ")
    assert "1e-05 rad from the norm-rescaled mean" in in_weights
    assert in_weights.endswith("so expect the same model from both.")
    assert f"{shift} of the weights' norm" in in_deltas
    apart = "only an evaluation of both can tell which is better."
    assert in_deltas.endswith("expect the same model from both." if is_one_model else apart)


def test_without_a_base_it_asks_for_one_and_without_tensors_says_so() -> None:
    without_base = inspected(view(100, 1e-5), None)
    assert inspection_verdict(without_base).endswith("Pass the base model to see the deltas, where angles are wide.")
    assert inspection_verdict(Inspection(["a", "b"], [], without_base.total)) == "There is no tensor to merge."
