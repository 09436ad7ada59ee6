"""What a block gives with parts that are not computed again, against the same block computed anew."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from blockwise_models import MODELS, inputs, inside, opened

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Taps
from hf_frmerge.calibration.blocks.layers import BlockLayers, find_layers, names_of_step
from hf_frmerge.calibration.blocks.replay import Replay


@dataclass
class Block:
    """The second block of a model, and what enters it."""

    model: BlockwiseModel
    name: str
    weights: dict[str, torch.Tensor]
    hidden: torch.Tensor
    call: Any

    @property
    def layers(self) -> BlockLayers:
        return find_layers(self.model, self.name, self.weights, self.hidden, self.call)

    def entering(self, name: str) -> torch.Tensor:
        with Taps(self.model.block(self.name), [name], last=name) as taps:
            self.model.run_block(self.name, self.weights, self.hidden, self.call)
        return taps.inputs[name]


def second_block(name: str) -> Block:
    _, model, weights = opened(name)
    first, second = model.blocks[:2]
    outer = {key: weights[key] for key in model.outer_parameters()}
    hidden, calls = model.begin(outer, inside(weights, first), inputs(padded=True))
    return Block(model, second, inside(weights, second), hidden, calls[1])


@pytest.mark.parametrize("name", MODELS)
def test_what_enters_every_layer_is_the_same_while_those_before_it_change(name: str) -> None:
    block = second_block(name)
    replay = Replay(block.model.block(block.name), block.layers)
    for step in block.layers.steps:
        entered = names_of_step(step)[0]
        for _ in range(2):  # the first time some is kept, the second it is taken
            with replay.running(7, step):
                actual = block.entering(entered)
            assert torch.equal(actual, block.entering(entered)), entered
        for fitted in names_of_step(step):  # as a fit changes them
            changed = {key: w + 0.1 for key, w in block.weights.items() if key.startswith(f"{fitted}.")}
            assert changed
            block.weights |= changed


def test_attention_runs_once_for_all_layers_behind_it() -> None:
    block = second_block("Llama")
    module, layers = block.model.block(block.name), block.layers
    replay, runs = Replay(module, layers), []
    module.get_submodule("self_attn.o_proj").register_forward_hook(lambda *_: runs.append(1))
    *_, gate, down = layers.groups
    assert replay.fitted_before(layers.groups[1]) == []
    assert replay.fitted_before(gate) == replay.fitted_before(down) == ["self_attn"]
    for batch, step in ((0, gate), (0, down), (1, down), (1, down)):
        with replay.running(batch, step):
            block.entering(step.names[0])
    assert len(runs) == 2  # once for each batch


def test_what_is_larger_than_what_enters_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class_name, config = MODELS["Llama"]
    eager = copy.deepcopy(config)
    eager._attn_implementation = "eager"  # gives its weights too, which are quadratic in the length
    monkeypatch.setitem(MODELS, "Llama", (class_name, eager))
    for name, part, layer in (
        ("Llama", "self_attn", "self_attn.o_proj"),
        ("BERT", "intermediate", "intermediate.dense"),
    ):
        block, runs = second_block(name), []
        module = block.model.block(block.name)
        module.get_submodule(layer).register_forward_hook(lambda *_, runs=runs: runs.append(1))
        last, replay = block.layers.groups[-1], Replay(module, block.layers)
        runs.clear()
        assert part in replay.fitted_before(last)
        for _ in range(2):
            with replay.running(0, last):
                block.entering(last.names[0])
        assert len(runs) == 2
