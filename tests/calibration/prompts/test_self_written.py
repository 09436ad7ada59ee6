"""Prompts written by the experts, against draws from naive forward passes over the whole text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
)

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration import calibrate
from hf_frmerge.calibration.prompts import self_written
from hf_frmerge.calibration.prompts.self_written import (
    _draw,
    chat_prefix,
    document_prefix,
    self_written_prompts,
    write_prompts,
)
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.evaluation.models.identity import key_of, model_identity
from tests.tiny_models import save_classifier_family, save_llama_family, word_tokenizer

WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    save_llama_family(root, WORDS, spread=0.3)
    save_classifier_family(root / "classifiers", WORDS, spread=0.3)
    return root


@pytest.fixture(scope="module")
def model(family: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(family / "math", dtype=torch.float32)


def test_tokens_are_drawn_from_the_predictions(model: Any) -> None:
    """The same uniform numbers, through the cumulative distribution in float64 of a forward pass without a cache."""
    numbers = (0, 1, 2, 70, 3)
    written = write_prompts(model, numbers, 12, prefix=[3, 1], seed=7)
    for number, row in zip(numbers, written.tolist(), strict=True):
        expected = [3, 1]
        for u in np.random.default_rng([7, number]).random(10):
            with torch.no_grad():
                logits = model(torch.tensor([expected]), use_cache=False).logits[0, -1].double()
            below = np.cumsum(np.exp(logits.numpy()) / np.exp(logits.numpy()).sum())
            expected.append(int((below <= u).sum()))
        assert row == expected


def test_frequencies_are_the_model_s_probabilities(model: Any) -> None:
    first = write_prompts(model, range(20_000), 2, prefix=[5], seed=0)[:, 1]
    with torch.no_grad():
        expected = model(torch.tensor([[5]])).logits[0, -1].double().softmax(-1).numpy()
    counts = np.bincount(first, minlength=len(expected))
    deviations = (counts - 20_000 * expected) / np.sqrt(20_000 * expected * (1 - expected))
    assert np.abs(deviations).max() < 4.5  # of 41 binomial counts, in standard deviations


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.5, 3), (1.0, 3)])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, token: int) -> None:
    """Not even by a number on the edge of an interval."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0]])
    assert _draw(logits, torch.full((1, 1), uniform, dtype=torch.float64)).tolist() == [[token]]


def test_the_model_and_the_global_generator_are_left_as_they_were(model: Any) -> None:
    model.train()
    state = torch.get_rng_state()
    first = write_prompts(model, range(3), 6, prefix=[1], seed=1)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.rand(5)
    assert np.array_equal(write_prompts(model, range(3), 6, prefix=[1], seed=1), first)
    assert not np.array_equal(write_prompts(model, range(3), 6, prefix=[1], seed=2), first)


def test_what_cannot_write_is_refused(model: Any, family: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(family / "classifiers" / "math")
    with pytest.raises(ArgumentError, match="BertForSequenceClassification does not write text"):
        write_prompts(classifier, [0], 4, prefix=[1], seed=0)
    with pytest.raises(ArgumentError, match="Raise max_calibration_length above 4"):
        write_prompts(model, [0], 4, prefix=[1, 2, 3, 4], seed=0)
    assert len(write_prompts(model, [0], 5, prefix=[1, 2, 3, 4], seed=0)[0]) == 5  # that advice
    with pytest.raises(ArgumentError, match="begin with 0 given ones"):
        write_prompts(model, [0], 4, prefix=[], seed=0)


def test_a_model_that_remembers_in_another_way_is_refused() -> None:
    """Its next call would not know of the tokens so far, and would write nonsense."""
    mamba = MambaForCausalLM(MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ArgumentError, match="MambaForCausalLM keeps no past_key_values"):
        write_prompts(mamba, [0], 4, prefix=[1], seed=0)


def test_predictions_that_are_not_finite_are_refused(family: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(family / "math", dtype=torch.float32)
    broken.model.norm.weight.data = torch.full_like(broken.model.norm.weight, float("inf"))
    with pytest.raises(NonFiniteError, match="not finite"):
        write_prompts(broken, [0], 4, prefix=[1], seed=0)


# ---- experts --------------------------------------------------------------------------------------------------------


def experts_write(experts: list[Path], base: Path | None, cache: Path, **options: Any) -> Any:
    chosen: dict[str, Any] = {"prefix": [1], "leading": [], "n_samples": 4, "max_length": 8, "seed": 0} | options
    return self_written_prompts(
        [resolve(str(expert)) for expert in experts],
        resolve(str(base)) if base is not None else None,
        cache_dir=cache,
        **chosen,
    )


def seed_of(*models: Path) -> int:
    """Return the seed of the expert with this content."""
    return int(key_of([0, [model_identity(resolve(str(model))) for model in models]])[:16], 16)


def test_every_expert_writes_its_own_prompts(family: Path, tmp_path: Path) -> None:
    prompts = experts_write([family / "math", family / "code"], None, tmp_path)
    assert [(p.expert, p.source, len(p.token_ids)) for p in prompts] == [(0, "self", 4), (1, "self", 4)]
    code = AutoModelForCausalLM.from_pretrained(family / "code")
    # What the texts are written behind is no part of the prompts.
    expected = write_prompts(code, range(4), 9, prefix=[1], seed=seed_of(family / "code"))[:, 1:]
    assert [ids.tolist() for ids in prompts[1].token_ids] == expected.tolist()
    assert prompts[0].digest != prompts[1].digest


def test_prompts_begin_as_the_tokenizer_begins_texts(family: Path, tmp_path: Path) -> None:
    (prompts,) = experts_write([family / "code"], None, tmp_path, leading=[1])
    code = AutoModelForCausalLM.from_pretrained(family / "code")
    expected = write_prompts(code, range(4), 8, prefix=[1], seed=seed_of(family / "code"))
    assert [ids.tolist() for ids in prompts.token_ids] == expected.tolist()
    assert prompts.leading == (1,)


def test_an_adapter_writes_on_its_base(family: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(family / "base")
    adapted: Any = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    (prompts,) = experts_write([tmp_path / "adapter"], family / "base", tmp_path / "cache")
    expected = write_prompts(adapted, range(4), 9, prefix=[1], seed=seed_of(tmp_path / "adapter", family / "base"))
    assert [ids.tolist() for ids in prompts.token_ids] == expected[:, 1:].tolist()


def test_prompts_are_kept_under_everything_they_depend_on(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = experts_write([family / "math"], None, tmp_path)
    kept = [file.read_bytes() for file in tmp_path.iterdir()]
    monkeypatch.setattr("hf_frmerge.calibration.prompts.self_written.write_prompts", None)  # must not be called
    again = experts_write([family / "math"], None, tmp_path)
    assert again[0].digest == first[0].digest
    monkeypatch.undo()
    variants: list[dict[str, Any]] = [
        {"prefix": [2]}, {"leading": [1]}, {"n_samples": 3}, {"max_length": 7}, {"seed": 1}, {"dtype": "float32"}
    ]  # fmt: skip
    for variant in variants:
        experts_write([family / "math"], None, tmp_path, **variant)
    experts_write([family / "code"], None, tmp_path)
    files = list(tmp_path.iterdir())
    assert len(files) == 1 + len(variants) + 1
    for file in files:  # damaged entries are written again
        file.write_bytes(file.read_bytes()[:100])
    assert experts_write([family / "math"], None, tmp_path)[0].digest == first[0].digest
    assert kept[0] in [file.read_bytes() for file in tmp_path.iterdir()]


def test_an_expert_s_prompts_are_found_again_beside_others_and_when_more_are_wanted(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_written, "BATCH", 4)
    calls: list[list[int]] = []
    write = write_prompts

    def counted(model: Any, numbers: Any, *args: Any, **options: Any) -> Any:
        calls.append([*numbers])
        return write(model, numbers, *args, **options)

    monkeypatch.setattr(self_written, "write_prompts", counted)
    (four,) = experts_write([family / "math"], None, tmp_path)
    _, moved = experts_write([family / "code", family / "math"], None, tmp_path)
    (ten,) = experts_write([family / "math"], None, tmp_path, n_samples=10)
    assert calls == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]  # those of code are the second
    assert moved.digest == four.digest
    assert [ids.tolist() for ids in ten.token_ids[:4]] == [ids.tolist() for ids in four.token_ids]
    assert len({tuple(ids) for ids in ten.token_ids}) == 10


def test_errors_name_the_expert(family: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"The expert '.*classifiers/math' gives no prompts\. Bert"):
        experts_write([family / "classifiers" / "math"], None, tmp_path)


# ---- prefixes -------------------------------------------------------------------------------------------------------


def test_a_text_begins_behind_the_separator_of_documents() -> None:
    assert document_prefix(word_tokenizer(WORDS, bos_token="<|im_start|>", pad_token="<|endoftext|>")) == [2]
    assert document_prefix(word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>")) == [1]
    assert document_prefix(word_tokenizer(WORDS, eos_token="</s>")) == [1]
    with pytest.raises(ArgumentError, match="no token that begins or ends a text"):
        document_prefix(word_tokenizer(WORDS))


# ---- behind the chat template ---------------------------------------------------------------------------------------

CHAT = {"system": "<|system|>", "user": "<|user|>", "end": "<|end|>"}
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|system|> w1 w2 <|end|> {% endif %}"
    "<|{{ message['role'] }}|> {{ message['content'] | trim }} <|end|> {% endfor %}"
)


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    words = word_tokenizer(WORDS, eos_token="</s>")
    words.add_special_tokens({"additional_special_tokens": list(CHAT.values())})
    words.chat_template = template
    return words


def test_what_the_template_puts_before_a_user_s_first_message() -> None:
    tokenizer = chat_tokenizer()
    expected = tokenizer.convert_tokens_to_ids([CHAT["system"], "w1", "w2", CHAT["end"], CHAT["user"]])
    assert chat_prefix(tokenizer) == expected
    # Whatever the message is, a conversation begins with it.
    message = [{"role": "user", "content": "w7 w8"}]
    whole = tokenizer.apply_chat_template(message, tokenize=True, return_dict=False)
    assert whole[: len(expected)] == expected and whole[len(expected) :][:2] == tokenizer("w7 w8")["input_ids"][:2]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "tokenizer has no chat template, .* self in place of self:chat"),
        ("{{ raise_exception('users are to be quiet') }}", "cannot be applied to a user's message .*to be quiet"),
        ("{{ messages[0]['content'] }}", "puts nothing before a user's message"),
        ("<|user|> {{ messages[0]['content'] | upper }}", "puts nothing before a user's message"),
    ],
)
def test_a_template_to_write_behind_is_needed(template: str | None, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        chat_prefix(chat_tokenizer(template))


@pytest.fixture(scope="module")
def chats(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family without a template at its base; two experts have learned one."""
    root = tmp_path_factory.mktemp("chats")
    for name in ("base", "math", "code"):
        shutil.copytree(family / name, root / name)
        chat_tokenizer(TEMPLATE if name != "base" else None).save_pretrained(root / name)
        model: Any = AutoModelForCausalLM.from_pretrained(family / name)
        model.resize_token_embeddings(len(chat_tokenizer()), mean_resizing=False)
        model.save_pretrained(root / name)
    return root


def merge_chats(chats: Path, out: Path, calibration: Any, **options: Any) -> FisherRaoMerger:
    chosen = {"num_calibration_samples": 8, "max_calibration_length": 12, "disable_tqdm": True} | options
    args = MergingArguments(output_dir=str(out), **chosen)
    experts = [str(chats / name) for name in ("math", "code")]
    return FisherRaoMerger(experts, args, base_model=str(chats / "base"), calibration_dataset=calibration).merge()


def test_experts_write_behind_the_template(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt has the whole prefix, as what the merge will read has, and its tokens count among those of a prompt."""
    monkeypatch.setattr(self_written, "default_cache_dir", lambda: tmp_path / "cache" / "evaluation")
    seen: list[Any] = []
    fit = calibrate.calibrate
    monkeypatch.setattr(calibrate, "calibrate", lambda *args: (seen.append(args[3]), fit(*args))[1])
    merger = merge_chats(chats, tmp_path / "out", "self:chat")
    prefix = chat_prefix(chat_tokenizer())
    for prompts, name in zip(seen[0], ("math", "code"), strict=True):
        expert = AutoModelForCausalLM.from_pretrained(chats / name)
        own_seed = int(key_of([42, [model_identity(resolve(str(chats / name)))]])[:16], 16)
        expected = write_prompts(expert, range(8), 12, prefix=prefix, seed=own_seed)
        assert np.array_equal(np.stack(prompts.token_ids), expected)
        assert prompts.token_ids[0][: len(prefix)].tolist() == prefix == list(prompts.leading)
    record = merger.manifest.calibration if merger.manifest is not None else None
    assert record is not None and record.source == "self:chat"
    card = (tmp_path / "out/README.md").read_text()
    assert "--calibration self:chat" in card and "as a user of a chat would" in card
    # Those that are written without the template are others, in files of their own.
    n_files = len(list((tmp_path / "cache/prompts").iterdir()))
    merge_chats(chats, tmp_path / "plain", "self")
    assert len(list((tmp_path / "cache/prompts").iterdir())) == n_files + 2
    assert seen[1][0].source == "self" and prefix[0] not in seen[1][0].token_ids[0][:1]
    assert seen[1][0].digest != seen[0][0].digest


def test_the_template_s_absence_and_length_are_said_before_anything_is_done(
    chats: Path, family: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="self in place of self:chat"):
        merge_chats(family, tmp_path / "out", "self:chat")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArgumentError, match="Raise max_calibration_length above 5"):
        merge_chats(chats, tmp_path / "out", "self:chat", max_calibration_length=5)
    with pytest.raises(ArgumentError, match="None of the models has a tokenizer"):
        for name in ("base", "math", "code"):
            model = AutoModelForCausalLM.from_pretrained(chats / name)
            model.save_pretrained(tmp_path / "bare" / name)
        merge_chats(tmp_path / "bare", tmp_path / "out", "self:chat")
