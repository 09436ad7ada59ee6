"""Comparisons against the models' own losses, and recovery against arithmetic done by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.evaluation.compare import Score, compare_models, read_texts, recovered

TEXTS = {"odd": ["one three five one three five seven"], "even": ["two four two four six", "eight six four two"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `other` and `adapter` of `base`."""
    root = tmp_path_factory.mktemp("compare")
    words = ["<unk>", "one", "two", "three", "four", "five", "six", "seven", "eight"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), initializer_range=0.3, **sizes)).save_pretrained(
            root / name
        )
        fast.save_pretrained(root / name)
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(root / "adapter", save_embedding_layers=False)
    return root


def loss_of(model: torch.nn.Module, rows: list[str]) -> float:
    """Transformers' own loss over the joined rows, which fit into one block."""
    words = ["<unk>", "one", "two", "three", "four", "five", "six", "seven", "eight"]
    tokens = torch.tensor([[words.index(word) for row in rows for word in row.split()]])
    with torch.inference_mode():
        return model(input_ids=tokens, labels=tokens).loss.item()


def test_scores_are_the_losses_of_full_models_and_adapters(folder: Path) -> None:
    models = {name: folder / name for name in ("base", "other", "adapter")}
    seen: list[Score] = []
    scores = compare_models(models, TEXTS, base_model=folder / "base", on_score=seen.append)
    assert seen == scores
    assert [(score.model, score.domain) for score in scores] == [(m, t) for m in models for t in TEXTS]
    loaded = {name: AutoModelForCausalLM.from_pretrained(folder / name) for name in ("base", "other")}
    loaded["adapter"] = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter")
    ).merge_and_unload()  # not how the adapter is run above
    for score in scores:
        assert score.loss == pytest.approx(loss_of(loaded[score.model].eval(), TEXTS[score.domain]), abs=1e-5)
        assert score.perplexity == pytest.approx(math.exp(score.loss))
        assert score.n_tokens == sum(len(row.split()) for row in TEXTS[score.domain]) - 1
    assert json.loads(json.dumps(scores[0].to_dict()))["model"] == "base"


def test_nothing_is_loaded_before_all_are_found(folder: Path) -> None:
    seen: list[Score] = []
    with pytest.raises(CheckpointError, match="nowhere"):
        compare_models({"base": folder / "base", "x": "./nowhere"}, TEXTS, on_score=seen.append)
    with pytest.raises(ArgumentError, match=r"adapter.*base_model"):
        compare_models({"base": folder / "base", "x": folder / "adapter"}, TEXTS, on_score=seen.append)
    assert seen == []
    with pytest.raises(ArgumentError, match="at least one"):
        compare_models({"base": folder / "base"}, {})


def score(model: str, domain: str, loss: float) -> Score:
    return Score(model, domain, loss, math.exp(loss), 0.0, 100)


def test_recovery_by_hand() -> None:
    scores = [
        *(score("base", domain, loss) for domain, loss in {"a": 4.0, "b": 3.0}.items()),
        *(score("ea", domain, loss) for domain, loss in {"a": 2.0, "b": 3.5}.items()),  # gains most on a
        *(score("b", domain, loss) for domain, loss in {"a": 3.5, "b": 2.9}.items()),  # a is not its own, b is
        *(score("bad", domain, loss) for domain, loss in {"a": 4.5, "b": 3.2}.items()),
        *(score("merged", domain, loss) for domain, loss in {"a": 2.5, "b": 3.1}.items()),
    ]
    ea, b, bad = recovered(scores, ["merged"], ["ea", "b", "bad"], "base")
    assert (ea.domain, ea.gain, ea.kept, ea.share) == ("a", 2.0, 1.5, 0.75)
    assert (b.domain, b.gain, b.kept) == ("b", pytest.approx(0.1), pytest.approx(-0.1))
    assert b.share == pytest.approx(-1.0)
    assert bad.domain == "b" and math.isnan(bad.share), "an expert that lost everywhere has no gain to keep"
    assert bad.to_dict()["share"] is None and ea.to_dict()["share"] == 0.75


def test_texts_of_every_kind(tmp_path: Path) -> None:
    rows = [{"text": "one two"}, {"text": "three"}]
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("text\none two\nthree\n")
    assert list(read_texts(tmp_path / "a.txt")) == ["one\ntwo\n"]
    assert list(read_texts(tmp_path / "a.jsonl")) == list(read_texts(tmp_path / "a.csv")) == rows
    with pytest.raises(ArgumentError, match=r"b\.txt.*not a file"):
        read_texts(tmp_path / "b.txt")
    (tmp_path / "latin.txt").write_bytes("Ägypten".encode("latin-1"))
    with pytest.raises(ArgumentError, match="not UTF-8"):
        read_texts(tmp_path / "latin.txt")
