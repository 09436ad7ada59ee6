"""Fisher information by drawn labels, against closed forms and sums over all labels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.fisher.diagonal import diagonal_fisher
from hf_frmerge.fisher.scores import check_scores


class SoftmaxRegression(torch.nn.Module):
    """Logits `W x + b` of fixed features of every token, as a model of transformers returns them."""

    def __init__(self, n_classes: int = 4, *, by_prompt: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = torch.nn.Embedding(6, 3)
        self.head = torch.nn.Linear(3, n_classes)
        self.by_prompt = by_prompt
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        x = self.features(input_ids)
        return SimpleNamespace(logits=self.head(x.mean(1) if self.by_prompt else x))


def closed_form(model: SoftmaxRegression, prompts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of softmax regression: E x_j^2 p_c (1 - p_c) for the weight, E p_c (1 - p_c) for the bias."""
    x = torch.stack([model.features.weight[token] for ids in prompts for token in ids]).double()
    if model.by_prompt:
        x = x.reshape(len(prompts), -1, 3).mean(1)
    p = (x @ model.head.weight.double().T + model.head.bias.double()).softmax(-1)
    spread = p * (1 - p)
    return (spread[:, :, None] * x[:, None, :].square()).mean(0).detach(), spread.mean(0).detach()


@pytest.mark.parametrize("by_prompt", [False, True])
def test_of_softmax_regression_it_is_the_closed_form(by_prompt: bool) -> None:
    model = SoftmaxRegression(by_prompt=by_prompt)
    prompts = [np.array(ids) for ids in ([0, 1, 2, 3], [4, 5, 0, 0], [2, 2, 5, 1])]
    n_draws = 3000
    found, n_predictions = diagonal_fisher(model, prompts * n_draws, ["head.weight", "head.bias"], seed=1)
    assert n_predictions == n_draws * 3 * (1 if by_prompt else 4)
    weight, bias = closed_form(model, prompts)
    # The squares have a spread of about 1.5 times their mean, so this is some four standard errors.
    torch.testing.assert_close(found["head.weight"].double(), weight, rtol=0.08, atol=0.01 * float(weight.max()))
    torch.testing.assert_close(found["head.bias"].double(), bias, rtol=0.08, atol=0.0)
    assert model.features.weight.grad is None and model.head.weight.grad is None


def test_of_a_language_model_it_is_the_sum_over_all_tokens() -> None:
    """Every token of the vocabulary as a label at every place, each with a backward pass of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = np.array([1, 4, 2])
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
    parameters = [model.get_parameter(name) for name in names]
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    log_probs = model(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
    for place in range(3):
        for token in range(6):
            grads = torch.autograd.grad(log_probs[place, token], parameters, retain_graph=True)
            for total, grad in zip(expected, grads):
                total.add_(log_probs[place, token].detach().exp() * grad.square() / 3)
    n_draws = 1500
    found, _ = diagonal_fisher(model, [ids] * n_draws, names, seed=0)
    for name, total in zip(names, expected):
        assert float(found[name].sum()) == pytest.approx(float(total.sum()), rel=0.1)
        torch.testing.assert_close(found[name], total, rtol=0.25, atol=0.05 * float(total.max()))


@pytest.mark.parametrize("by_prompt", [False, True])
def test_summed_over_all_labels_it_is_the_closed_form_at_once(by_prompt: bool) -> None:
    model = SoftmaxRegression(by_prompt=by_prompt)
    prompts = [np.array(ids) for ids in ([0, 1, 2, 3], [4, 5, 0, 0], [2, 2, 5, 1])]
    found, n_predictions = diagonal_fisher(model, prompts, ["head.weight", "head.bias"], labels="exact", seed=1)
    assert n_predictions == (3 if by_prompt else 12)
    weight, bias = closed_form(model, prompts)
    torch.testing.assert_close(found["head.weight"].double(), weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["head.bias"].double(), bias, rtol=1e-5, atol=1e-7)


def test_the_empirical_one_is_about_the_tokens_of_the_text() -> None:
    """Of softmax regression: the mean of x_j^2 (y_c - p_c)^2, y one at the next token; the last has none."""
    model, n_draws = SoftmaxRegression(n_classes=6), 1500
    prompts = [np.array(ids) for ids in ([0, 1, 2, 3], [4, 5, 0])]
    names = ["head.weight", "head.bias"]
    found, n_predictions = diagonal_fisher(model, prompts * n_draws, names, labels="empirical", seed=1)
    assert n_predictions == n_draws * 5
    x = torch.stack([model.features.weight[token] for ids in prompts for token in ids[:-1]]).double()
    p = (x @ model.head.weight.double().T + model.head.bias.double()).softmax(-1)
    y = torch.nn.functional.one_hot(torch.tensor([1, 2, 3, 5, 0]), 6)
    squared = (y - p).square().detach()
    weight = (squared[:, :, None] * x[:, None, :].square()).mean(0).detach()
    torch.testing.assert_close(found["head.weight"].double(), weight, rtol=0.08, atol=0.02 * float(weight.max()))
    torch.testing.assert_close(found["head.bias"].double(), squared.mean(0), rtol=0.08, atol=0.0)
    # That of drawn labels is another one.
    true = (p * (1 - p)).mean(0).detach()
    assert float((true - squared.mean(0)).abs().max()) > 0.2 * float(true.max())


def test_it_depends_on_the_seed_alone() -> None:
    model, prompts = SoftmaxRegression(), [np.array([0, 1, 2])]
    first, again, other = (diagonal_fisher(model, prompts, ["head.weight"], seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first["head.weight"], again["head.weight"])
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_what_has_no_information_is_refused() -> None:
    prompts = [np.array([0, 1])]
    with pytest.raises(ArgumentError, match=r"no parameter 'neck.weight'.*Merge experts of one class"):
        diagonal_fisher(SoftmaxRegression(), prompts, ["neck.weight"], seed=0)
    with pytest.raises(ArgumentError, match="SoftmaxRegression gives no probabilities"):
        diagonal_fisher(SoftmaxRegression(1), prompts, ["head.weight"], seed=0)
    with pytest.raises(
        ArgumentError, match=r"'exact' runs backwards once for every label.* 300 labels: more than 256"
    ):
        diagonal_fisher(SoftmaxRegression(300), prompts, ["head.weight"], labels="exact", seed=0)
    # Of models of transformers it is told before they are run.
    config = LlamaConfig(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with torch.device("meta"):
        model, bare = LlamaForCausalLM(config), LlamaModel(config)
    with pytest.raises(ArgumentError, match="300 labels: more than 256"):
        check_scores(model, "exact")
    check_scores(model, "sampled")
    with pytest.raises(ArgumentError, match="LlamaModel gives no probabilities"):
        check_scores(bare, "sampled")
    with pytest.raises(
        ArgumentError, match=r"'empirical' takes the next tokens.*SoftmaxRegression predicts something"
    ):
        diagonal_fisher(SoftmaxRegression(by_prompt=True), prompts, ["head.weight"], labels="empirical", seed=0)
    broken = SoftmaxRegression()
    with torch.no_grad():
        broken.head.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="predicts values that are not finite"):
        diagonal_fisher(broken, prompts, ["head.weight"], seed=0)
