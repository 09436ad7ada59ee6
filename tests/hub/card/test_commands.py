"""The code a card shows runs as it stands, against a model pushed to the Hub."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from card_examples import full
from hub_server import HubServer

from hf_frmerge.hub.card.card import write_card
from hf_frmerge.hub.card.data import CardSource, MergeCard
from hf_frmerge.hub.card.tasks import read_task


def save_tiny_llama(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "Once", "upon", "a", "time", "there", "was", "one"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>").save_pretrained(folder)


def finish(hub: HubServer, folder: Path, card: MergeCard) -> str:
    """Put the model on the Hub with its card; return the first Python block of the card."""
    text = write_card(card, folder).read_text()
    assert card.hub_model_id is not None
    hub.add_repo(card.hub_model_id, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.mark.parametrize("sharded", [False, True])
def test_first_code_block_of_a_full_model(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], sharded: bool
):
    save_tiny_llama(tmp_path)
    if sharded:
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        model.save_pretrained(tmp_path, max_shard_size="4KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    card = MergeCard("tiny", "full", full().sources, hub_model_id="alice/tiny", task=read_task(tmp_path))
    capsys.readouterr()
    exec(finish(hub, tmp_path, card), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_first_code_block_of_an_adapter(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = tmp_path / "base"
    save_tiny_llama(base)
    hub.add_repo("alice/base", {path.name: path.read_bytes() for path in base.iterdir()})
    model = LlamaForCausalLM.from_pretrained("alice/base", token=False)
    adapter = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(adapter)
    card = MergeCard(
        "tiny-lora",
        "adapter",
        [
            CardSource("one", weight=0.5, kind="adapter"),
            CardSource("two", weight=0.5, kind="adapter"),
            CardSource("alice/base", "alice/base", role="base"),
        ],
        hub_model_id="alice/tiny-lora",
        task=read_task(adapter),
    )
    code = finish(hub, adapter, card)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_the_python_that_repeats_the_merge_uses_names_that_exist():
    from hf_frmerge import MergingArguments
    from hf_frmerge.hub.card.commands import reproduce_python

    code = reproduce_python(full())
    calls: dict[str, object] = {}

    class Recorder:
        def __init__(self, **kwargs: object) -> None:
            calls.update(kwargs)

        def merge(self) -> None:
            calls["merged"] = True

    names = code.replace("from hf_frmerge import FisherRaoMerger, MergingArguments", "")
    exec(names, {"FisherRaoMerger": Recorder, "MergingArguments": MergingArguments})
    assert calls["experts"] == [source.pinned for source in full().experts]
    assert calls["weights"] == [0.5, 0.3, 0.2]
    assert calls["args"].tol == 1e-10
    assert calls["merged"]


def test_the_command_that_repeats_the_merge_uses_options_that_exist():
    import dataclasses
    import shlex

    from card_examples import adapter, mixed

    from hf_frmerge import MergingArguments
    from hf_frmerge.hub.card.commands import reproduce_command

    known = {field.name for field in dataclasses.fields(MergingArguments)} | {"weights", "base_model"}
    for card in (full(), adapter(), mixed()):
        words = shlex.split(reproduce_command(card).replace("\\\n", ""))
        options = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        assert options <= known
        assert [word for word in words[2:] if not word.startswith("-")][: len(card.experts)] == [
            source.pinned for source in card.experts
        ]
