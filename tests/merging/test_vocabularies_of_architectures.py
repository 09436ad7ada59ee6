"""Rows of tokens in other architectures: tied and untied, with biases, encoder-decoders, vision-language models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import word_tokenizer
from token_families import vocabulary_of

from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.verify import verify

WORDS = [f"w{number}" for number in range(36)]
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = LLAMA | {"image_size": 32, "patch_size": 16, "model_type": "clip_vision_model"}
BART = {
    f"{side}_{key}": 1 if key == "layers" else 2
    for side in ("encoder", "decoder")
    for key in ("layers", "attention_heads")
}
ENDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}


def gpt2(n_tokens: int) -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=n_tokens, **ENDS)
    return transformers.GPT2LMHeadModel(config)


def bert(n_tokens: int) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**LLAMA, vocab_size=n_tokens, pad_token_id=2))


def bart(n_tokens: int) -> Any:
    widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "decoder_start_token_id": 1}
    config = transformers.BartConfig(**BART, **widths, vocab_size=n_tokens, forced_eos_token_id=None, **ENDS)
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias += torch.arange(n_tokens)  # a column for every token
    return model


def llava(n_tokens: int) -> Any:
    text = {**LLAMA, **ENDS, "model_type": "llama", "vocab_size": n_tokens, "tie_word_embeddings": False}
    config = transformers.LlavaConfig(text_config=text, vision_config=VISION, image_token_index=n_tokens - 1)
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "by_token"),
    [
        (gpt2, {"transformer.wte.weight"}),
        (bert, {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}),
        (bart, {"model.shared.weight", "final_logits_bias"}),
        (llava, {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}),
    ],
)
def test_rows_of_tokens(tmp_path: Path, build: Callable[[int], Any], by_token: set[str]) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, (folder, words) in enumerate(zip(folders, ([*WORDS, "<image>"], ["<new>", *WORDS[::-1], "<image>"]))):
        tokenizer = word_tokenizer(words, eos_token="<eos>", pad_token="<pad>")
        torch.manual_seed(seed)
        model = build(len(tokenizer))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    args = MergingArguments(str(tmp_path / "out"), method="linear", tokenizer_source="union")
    plan = build_plan([*map(str, folders)], args, [0.25, 0.75])
    run_merge(plan, StepObserver(), Processes())
    output, (ours, theirs) = vocabulary_of(tmp_path / "out"), map(vocabulary_of, folders)
    assert len(output) == 41
    merged, a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", *folders))
    assert plan.vocabulary is not None and by_token <= set(plan.vocabulary.tensors)
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        left, right = a[name].double().numpy(), b[name].double().numpy()
        if name in by_token:
            if left.shape[0] == 1:
                left, right = left[0], right[0]
            tokens = sorted(output, key=output.__getitem__)
            left = np.array([(left[ours[t]] if t in ours else right[theirs[t]]) for t in tokens])
            right = np.array([right[theirs[t]] for t in tokens])
        expected = 0.25 * left + 0.75 * right
        actual = tensor.double().numpy().reshape(expected.shape)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6, err_msg=name)
    architecture = json.loads((tmp_path / "out/config.json").read_text())["architectures"][0]
    loaded, report = getattr(transformers, architecture).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[output["w1"], output["<new>"], output["w35"]]])
    assert loaded.eval()(input_ids=ids).logits.shape[-1] == 41
    assert verify(str(tmp_path / "out")).ok
