from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from two_processes import run_on_two_processes

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.forward import evaluate_causal_lm, recovery

VOCAB = 64


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,  # wide, so that the losses of different tokens differ a lot
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def stream() -> list[int]:
    return np.random.default_rng(1).integers(0, VOCAB, size=150).tolist()


def naive(model: LlamaForCausalLM, stream: list[int], block_size: int) -> tuple[float, float, int]:
    """Score every token but the first on its own, in float64, from the context its block allows."""
    exact = LlamaForCausalLM(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    losses, hits = [], 0
    for position in range(1, len(stream)):
        start = (position - 1) // (block_size - 1) * (block_size - 1)
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([stream[start:position]])).logits[0, -1].numpy()
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[stream[position]])
        hits += int(logits.argmax() == stream[position])
    return sum(losses) / len(losses), hits / len(losses), len(losses)


def words_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB - 1)}
    tokenizer = Tokenizer(models.WordLevel({**words, "<unk>": VOCAB - 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


# 2 is the least; the others leave a last block of 3, 15, 3 and 24 of the 150 tokens
@pytest.mark.parametrize("block_size", [2, 8, 16, 50, 64])
def test_matches_a_naive_float64_loop(model: LlamaForCausalLM, stream: list[int], block_size: int) -> None:
    loss, accuracy, n_tokens = naive(model, stream, block_size)
    metrics = evaluate_causal_lm(model, None, [{"input_ids": stream}], block_size=block_size)
    assert metrics.loss == pytest.approx(loss, rel=1e-6)
    assert metrics.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert metrics.token_accuracy == accuracy
    assert metrics.n_tokens == n_tokens == len(stream) - 1


@pytest.mark.parametrize("batch_size", [2, 3, 8, 100])
def test_batch_size_and_padding_do_not_matter(model: LlamaForCausalLM, stream: list[int], batch_size: int) -> None:
    alone = evaluate_causal_lm(model, None, [{"input_ids": stream}], block_size=9, batch_size=1)  # never pads
    batched = evaluate_causal_lm(model, None, [{"input_ids": stream}], block_size=9, batch_size=batch_size)
    assert batched.loss == pytest.approx(alone.loss, rel=1e-6)
    assert (batched.token_accuracy, batched.n_tokens) == (alone.token_accuracy, alone.n_tokens)


def test_text_rows_are_joined_in_order(model: LlamaForCausalLM, stream: list[int]) -> None:
    words = [f"w{token % (VOCAB - 1)}" for token in stream]
    rows = [" ".join(words[:40]), "", " ".join(words[40:41]), " ".join(words[41:])]
    tokens = [token % (VOCAB - 1) for token in stream]
    expected = evaluate_causal_lm(model, None, [{"input_ids": tokens}], block_size=16)
    tokenizer = words_tokenizer()
    assert evaluate_causal_lm(model, tokenizer, rows, block_size=16) == expected
    assert evaluate_causal_lm(model, tokenizer, datasets.Dataset.from_dict({"text": rows}), block_size=16) == expected
    tokenised = datasets.Dataset.from_dict({"input_ids": [tokens[:40], [], tokens[40:]], "label": [0, 1, 2]})
    assert evaluate_causal_lm(model, None, tokenised, block_size=16) == expected


def test_max_length_cuts_every_row(model: LlamaForCausalLM, stream: list[int]) -> None:
    rows = [{"input_ids": stream[:70]}, {"input_ids": stream[70:]}]
    expected, _, n_tokens = naive(model, stream[:20] + stream[70:90], 16)
    metrics = evaluate_causal_lm(model, None, rows, block_size=16, max_length=20)
    assert metrics.loss == pytest.approx(expected, rel=1e-6)
    assert metrics.n_tokens == n_tokens == 39


def test_log_softmax_is_float32_for_a_bf16_model(model: LlamaForCausalLM, stream: list[int]) -> None:
    half = LlamaForCausalLM(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    with torch.no_grad():
        logits = half(input_ids=torch.tensor([stream[:64]])).logits[0, :-1].double()
    targets = torch.tensor(stream[1:64])
    expected = (logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]).mean().item()
    metrics = evaluate_causal_lm(half, None, [{"input_ids": stream[:64]}], block_size=64)
    # A bf16 log-softmax of losses around 10 would be off by some 1e-2.
    assert metrics.loss == pytest.approx(expected, rel=1e-6)


def test_every_batch_is_announced(model: LlamaForCausalLM, stream: list[int]) -> None:
    sizes: list[int] = []
    evaluate_causal_lm(
        model,
        None,
        [{"input_ids": stream}],
        block_size=16,
        batch_size=4,
        on_prediction_step=lambda loader: sizes.append(len(loader)),
    )
    assert sizes == [3, 3, 3]  # ten blocks overlapping by one


def test_dropout_is_off_and_training_mode_is_given_back(model: LlamaForCausalLM, stream: list[int]) -> None:
    dropout = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "attention_dropout": 0.5}))
    dropout.load_state_dict(model.state_dict())
    dropout.train()
    expected = evaluate_causal_lm(model, None, [{"input_ids": stream}], block_size=16)
    assert evaluate_causal_lm(dropout, None, [{"input_ids": stream}], block_size=16) == expected
    assert dropout.training


def test_blocks_do_not_exceed_the_models_positions(model: LlamaForCausalLM, stream: list[int]) -> None:
    loss, _, _ = naive(model, stream, model.config.max_position_embeddings)
    metrics = evaluate_causal_lm(model, None, [{"input_ids": stream}], block_size=1000)
    assert metrics.loss == pytest.approx(loss, rel=1e-6)


def test_refuses_data_it_cannot_score(model: LlamaForCausalLM, stream: list[int]) -> None:
    tokenizer = words_tokenizer()
    with pytest.raises(ArgumentError, match=r"needs a column `text` .* found \['sentence'\]"):
        evaluate_causal_lm(model, tokenizer, [{"sentence": "w1 w2"}])
    with pytest.raises(ArgumentError, match=r"1 token\(s\) in all"):
        evaluate_causal_lm(model, tokenizer, ["w1"])
    with pytest.raises(ArgumentError, match="0 token"):
        evaluate_causal_lm(model, tokenizer, [])
    with pytest.raises(ArgumentError, match="pass it as `processing_class`"):
        evaluate_causal_lm(model, None, ["w1 w2"])
    with pytest.raises(ArgumentError, match="token id 64, but the model's vocabulary has 64 entries"):
        evaluate_causal_lm(model, None, [{"input_ids": [*stream, VOCAB]}], block_size=16)
    with pytest.raises(ArgumentError, match="at least 2"):
        evaluate_causal_lm(model, None, [{"input_ids": stream}], block_size=1)


@pytest.mark.slow
def test_two_processes_score_every_token_once(model: LlamaForCausalLM, stream: list[int], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    # 22 blocks (batches of 4 on two ranks: 6 blocks on the last round), one block only, and 9 blocks
    streams = [stream, stream[:5], stream[: 8 * 7 + 2]]
    (tmp_path / "streams.json").write_text(json.dumps(streams))
    expected = [evaluate_causal_lm(model, None, [{"input_ids": s}], block_size=8, batch_size=4) for s in streams]
    for actual in run_on_two_processes("streams", tmp_path):
        for got, want in zip(actual, expected, strict=True):
            assert got["n_tokens"] == want.n_tokens
            assert got["token_accuracy"] == want.token_accuracy
            assert got["loss"] == pytest.approx(want.loss, rel=1e-12)
    assert [metrics.n_tokens for metrics in expected] == [len(s) - 1 for s in streams]


def test_recovery() -> None:
    assert recovery(base_loss=3.0, expert_loss=2.0, merged_loss=2.25) == 0.75
    assert recovery(base_loss=3.0, expert_loss=2.0, merged_loss=2.0) == 1.0
    assert recovery(base_loss=3.0, expert_loss=2.0, merged_loss=3.5) == -0.5
    assert math.isnan(recovery(base_loss=2.0, expert_loss=2.0, merged_loss=1.0))
    assert math.isnan(recovery(base_loss=2.0, expert_loss=2.5, merged_loss=2.0))
