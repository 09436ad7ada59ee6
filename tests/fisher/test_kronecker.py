"""Kronecker factors of Fisher information, against gradients one by one, in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.fisher.kronecker import kronecker_factors

VOCABULARY = 6


def llama(n_layers: int = 2) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=n_layers, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=16))


def classifier() -> Any:
    config: Any = BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.4,
    )  # fmt: skip
    config.num_labels = 3
    return BertForSequenceClassification(config)


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().double().eval()


def linear_layers(model: Any) -> list[str]:
    """Those in the blocks."""
    kinds = ("Linear", "Conv1D")
    return [n for n, m in model.named_modules() if type(m).__name__ in kinds and (".layer" in n or ".h." in n)]


def by_hand(model: Any, prompts: list[np.ndarray], layers: list[str]) -> tuple[Any, Any, Any]:
    """Every label of every prediction, one gradient each: A, G, and the information of the weights, whole."""
    of_inputs: Any = dict.fromkeys(layers, 0.0)
    of_outputs: Any = dict.fromkeys(layers, 0.0)
    whole: Any = dict.fromkeys(layers, 0.0)
    n_tokens = n_predictions = 0
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for ids in prompts:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _m, args, output, name=name, seen=seen: seen.__setitem__(name, (args[0], output))
            )
            for name in layers
        ]
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits
        for handle in handles:
            handle.remove()
        log_probs = logits.reshape(-1, logits.shape[-1]).log_softmax(-1)
        n_tokens, n_predictions = n_tokens + len(ids), n_predictions + len(log_probs)
        for name in layers:
            x = seen[name][0].detach().reshape(len(ids), -1)
            of_inputs[name] = of_inputs[name] + x.T @ x
        for place in range(len(log_probs)):
            for label in range(log_probs.shape[1]):
                share = log_probs[place, label].detach().exp()
                outputs = [seen[name][1] for name in layers]
                grads = torch.autograd.grad(log_probs[place, label], outputs, retain_graph=True)
                for name, grad in zip(layers, grads):
                    g, x = grad.reshape(len(ids), -1), seen[name][0].detach().reshape(len(ids), -1)
                    of_outputs[name] = of_outputs[name] + share * g.T @ g
                    flat = (g.T @ x).flatten()
                    whole[name] = whole[name] + share * torch.outer(flat, flat)
    return (
        {name: a / n_tokens for name, a in of_inputs.items()},
        {name: g / n_predictions for name, g in of_outputs.items()},
        {name: f / n_predictions for name, f in whole.items()},
    )


@pytest.mark.parametrize("make", [llama, gpt2, classifier])
def test_summed_over_all_labels_they_are_the_moments_of_single_gradients(make: Callable[[], Any]) -> None:
    model = made(make)
    prompts = [np.array(ids) for ids in ([1, 4, 2, 2], [3, 0])]
    layers = linear_layers(model)
    assert len(layers) == {llama: 14, gpt2: 8, classifier: 12}[make]
    of_inputs, of_outputs, _ = by_hand(model, prompts, layers)
    found, n_predictions = kronecker_factors(model, prompts, layers, labels="exact", seed=0)
    assert n_predictions == (2 if make is classifier else 6)
    for name in layers:
        torch.testing.assert_close(found.inputs[name].double(), of_inputs[name], rtol=1e-5, atol=1e-6)
        size = 1e-6 * float(of_outputs[name].abs().max()) + 1e-12
        torch.testing.assert_close(found.outputs[name].double(), of_outputs[name], rtol=1e-5, atol=size)
    if make is llama:  # query, key and value share an input; gate and up another
        shared = [found.inputs[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
        assert shared[0] is shared[1] is shared[2]
        assert found.inputs["model.layers.0.mlp.gate_proj"] is not shared[0]


@pytest.mark.parametrize("make", [llama, classifier])
def test_of_one_token_their_product_is_the_whole_information(make: Callable[[], Any]) -> None:
    model = made(make)
    prompts = [np.array([3])]
    layers = linear_layers(model)
    _, _, whole = by_hand(model, prompts, layers)
    found, _ = kronecker_factors(model, prompts, layers, labels="exact", seed=0)
    for name in layers:
        product = torch.kron(found.outputs[name], found.inputs[name]).double()
        torch.testing.assert_close(product, whole[name], rtol=1e-4, atol=1e-6 * float(whole[name].max()) + 1e-12)


def test_drawn_labels_are_right_in_the_mean() -> None:
    model, ids = made(lambda: llama(1)), np.array([1, 4, 2])
    layers = linear_layers(model)
    _, of_outputs, _ = by_hand(model, [ids], layers)
    found, n_predictions = kronecker_factors(model, [ids] * 500, layers, labels="sampled", seed=0)
    assert n_predictions == 1500
    for name in layers:
        expected = of_outputs[name]
        assert float(found.outputs[name].trace()) == pytest.approx(float(expected.trace()), rel=0.15)
        torch.testing.assert_close(
            found.outputs[name].double(), expected, rtol=0.25, atol=0.1 * float(expected.abs().max())
        )


class Routed(torch.nn.Module):
    """A layer for all tokens, and one that sees half of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = torch.nn.Embedding(VOCABULARY, 3)
        self.all, self.some = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        x = self.features(input_ids)
        outputs = self.all(x)
        return SimpleNamespace(logits=outputs + self.some(x[:, ::2]).mean(1, keepdim=True))


def test_a_layer_that_does_not_see_every_token_has_none() -> None:
    found, _ = kronecker_factors(Routed(), [np.array([0, 1, 2, 3])], ["all", "some"], seed=0)
    assert [*found.inputs] == [*found.outputs] == ["all"]


def test_what_has_no_factors_is_refused() -> None:
    prompts = [np.array([0, 1])]
    with pytest.raises(ArgumentError, match=r"no layer 'neck'.*Merge experts of one class"):
        kronecker_factors(Routed(), prompts, ["neck"], seed=0)
    broken = Routed()
    with torch.no_grad():
        broken.features.weight[0, 0] = 3e38  # the logits are finite, its square is not
        broken.all.weight.zero_()
        broken.some.weight.zero_()
    with pytest.raises(NonFiniteError, match=r"of 'all' is not finite\. Leave out the prompts"):
        kronecker_factors(broken, prompts, ["all"], seed=0)
