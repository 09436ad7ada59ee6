"""Names in memory and names on disk: what is one change of prefix, and what is another layer, tower or model."""

from __future__ import annotations

import pytest

from hf_frmerge.checkpoints.adapters.match import find_targets
from hf_frmerge.errors import CheckpointError

TEXT = {f"layers.{i}.q_proj.weight": (8, 8) for i in range(2)}
TOWERS = {
    **{f"model.language_model.{name}": shape for name, shape in TEXT.items()},
    **{f"model.vision_tower.{name}": (6, 6) for name in TEXT},
}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("", "model."),
        ("model.", ""),
        ("transformer.model.", "model."),
        ("language_model.model.", "model.language_model."),
        ("model.", "model.language_model."),
        ("", "0.auto_model."),
    ],
)
def test_parts_of_a_prefix_come_go_and_change_places(theirs: str, ours: str) -> None:
    base = {f"{ours}{name}": shape for name, shape in TEXT.items()}
    wanted = {f"{theirs}{name}": f"{ours}{name}" for name in TEXT}
    assert find_targets("spec", list(wanted), base) == wanted


def test_shapes_tell_towers_apart() -> None:
    wanted = {f"model.{name}": (8, 8) for name in TEXT}
    expected = {f"model.{name}": f"model.language_model.{name}" for name in TEXT}
    assert find_targets("spec", wanted, TOWERS) == expected
    with pytest.raises(CheckpointError, match=r"could mean several tensors.*language_model.*vision_tower"):
        find_targets("spec", list(wanted), TOWERS)


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.0.experts.1.w.weight",
        "model.layers.2.q_proj.weight",
        "bert.layers.0.q_proj.weight",
        "model.layers.0.k_proj.weight",
        "lm_head.weight",
    ],
    ids=["expert", "layer", "model", "module", "output layer"],
)
def test_another_layer_model_or_module_is_no_change_of_prefix(missing: str) -> None:
    base = {f"model.{name}": shape for name, shape in TEXT.items()} | {"model.layers.1.experts.0.w.weight": (8, 8)}
    with pytest.raises(CheckpointError, match=rf"changes {missing}, which the base model does not have"):
        find_targets("spec", [missing], base)
