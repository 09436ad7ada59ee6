from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge.evaluation.text.generation import continue_greedily, repetition

N_NEW = 8


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, initializer_range=0.5, eos_token_id=None, **sizes)).eval()


def by_hand(model: LlamaForCausalLM, prompt: list[int], ends: set[int]) -> tuple[list[int], float]:
    """Run the whole text again for every token."""
    tokens, entropies = list(prompt), []
    for _ in range(N_NEW):
        with torch.inference_mode():
            p = model(torch.tensor([tokens])).logits[0, -1].double().softmax(-1)
        entropies.append(-(p * p.log()).sum().item())
        if int(p.argmax()) in ends:
            break
        tokens.append(int(p.argmax()))
    return tokens[len(prompt) :], sum(entropies) / len(entropies)


def test_continuations_and_entropies(model: LlamaForCausalLM) -> None:
    prompts = [[1, 2, 3], [7, 8, 9], [3, 3, 3]]
    free = continue_greedily(model, torch.tensor(prompts), N_NEW)
    for prompt, (tokens, entropy) in zip(prompts, free):
        expected = by_hand(model, prompt, set())
        assert tokens == expected[0] and entropy == pytest.approx(expected[1], rel=1e-5)
    # Let the model end with what it says third on the first prompt: the others go on.
    end = free[0][0][2]
    model.generation_config.eos_token_id = end
    try:
        for prompt, (tokens, entropy) in zip(prompts, continue_greedily(model, torch.tensor(prompts), N_NEW)):
            expected = by_hand(model, prompt, {end})
            assert tokens == expected[0] and entropy == pytest.approx(expected[1], rel=1e-5)
    finally:
        model.generation_config.eos_token_id = None


def test_repetition_is_the_share_of_four_grams_seen_before() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1] * 7) == pytest.approx(3 / 4)  # four 4-grams, all the same
    assert repetition([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)
    assert repetition([1, 2, 3]) == 0
