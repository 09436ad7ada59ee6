"""Which tokens and settings are chosen, what is refused before any weight is read, and that the advice works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from token_families import VOCABULARY_TENSORS, bpe, renumbered, save_expert, vocabulary_of
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError, CheckpointError, MergeError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.plan import MergePlan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.verify import verify

TEMPLATE = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"


def plan_of(experts: list[Path], base: Path | None = None, out: str = "unused", **options: Any) -> MergePlan:
    plan = build_plan([*map(str, experts)], MergingArguments(out, **options), None, str(base) if base else None)
    plan.close()
    return plan


def merge(experts: list[Path], out: Path, base: Path | None = None, **options: Any) -> MergePlan:
    plan = build_plan([*map(str, experts)], MergingArguments(str(out), **options), None, str(base) if base else None)
    run_merge(plan, StepObserver(), Processes())
    plan.close()
    return plan


def code_in(error: object) -> str:
    return "\n".join(line[4:] for line in str(error).splitlines() if line.startswith("    "))


@pytest.fixture
def chat_family(tmp_path: Path) -> tuple[list[Path], Path]:
    """A plain base; a plain expert; a chat expert that ends its turns with a token of its own."""
    save_expert(tmp_path / "base")
    save_expert(tmp_path / "plain", seed=1)
    save_expert(tmp_path / "chat", special=["<turn>", "<end>"], seed=2, template=TEMPLATE, eos="<end>")
    generation = GenerationConfig(eos_token_id=[291, 0], temperature=0.3, do_sample=True, suppress_tokens=[290, 5])
    generation.save_pretrained(tmp_path / "chat")
    return [tmp_path / "plain", tmp_path / "chat"], tmp_path / "base"


# Advice about vocabularies


def test_other_sizes_and_moved_tokens_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    save_expert(tmp_path / "a")
    save_expert(tmp_path / "b", special=["<turn>"], seed=1)
    save_expert(tmp_path / "c", renumbered(bpe()), seed=2)
    for name, reason in (("b", "different sizes"), ("c", r"\d+ tokens have other ids in .*would be mixed")):
        with pytest.raises(CheckpointError, match=f"{reason}.*--tokenizer-source base, union or an expert"):
            plan_of([tmp_path / "a", tmp_path / name])
        merge([tmp_path / "a", tmp_path / name], tmp_path / f"out-{name}", tokenizer_source="union")
        assert verify(str(tmp_path / f"out-{name}")).ok


def test_too_few_rows_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    save_expert(tmp_path / "a")
    save_expert(tmp_path / "b", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "b")
    tokenizer.add_tokens(["<x>", "<y>"])
    tokenizer.save_pretrained(tmp_path / "b")
    with pytest.raises(
        CheckpointError, match=r"b' has 290 rows of embeddings, fewer than.*'<x>', '<y>' have"
    ) as refused:
        plan_of([tmp_path / "a", tmp_path / "b"], tokenizer_source="union")
    exec(code_in(refused.value).replace("resized", str(tmp_path / "resized")), {})
    merge([tmp_path / "a", tmp_path / "resized"], tmp_path / "out", tokenizer_source="union")
    assert vocabulary_of(tmp_path / "out")["<y>"] == 291


def test_an_expert_without_tokenizer_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    save_expert(tmp_path / "a", special=["<turn>"])
    save_expert(tmp_path / "b", seed=1)
    kept = AutoTokenizer.from_pretrained(tmp_path / "b")
    (tmp_path / "b/tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"b' has no tokenizer.json, so its rows cannot be matched"):
        plan_of([tmp_path / "a", tmp_path / "b"], tokenizer_source="a")
    kept.save_pretrained(tmp_path / "b")
    assert plan_of([tmp_path / "a", tmp_path / "b"], tokenizer_source="a").vocabulary is not None


def test_tokenizers_that_spell_differently_are_refused(tmp_path: Path) -> None:
    lower = bpe()
    lower.normalizer = normalizers.Lowercase()
    save_expert(tmp_path / "a", special=["<turn>"])
    save_expert(tmp_path / "b", lower, seed=1)
    with pytest.raises(
        CheckpointError, match=r"write their tokens differently \(normaliser: \[\] and \['Lowercase'\]"
    ):
        plan_of([tmp_path / "a", tmp_path / "b"], tokenizer_source="union")


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_an_adapter_with_the_tokens_of_its_base_is_merged(has_tokenizer: bool, tmp_path: Path) -> None:
    base = save_expert(tmp_path / "base")
    full = save_expert(tmp_path / "full", added=["<one>", "<two>"], seed=1)
    tuned: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    if has_tokenizer:
        AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    wanted = {name: tensor.double() for name, tensor in full.state_dict().items()}
    origin = load_file(tmp_path / "base" / "model.safetensors")
    adapted = {**tuned.double().merge_and_unload().state_dict()}
    merge(
        [tmp_path / "full", tmp_path / "adapter"], tmp_path / "out", tmp_path / "base",
        tokenizer_source="union", method="linear",
    )  # fmt: skip
    merged = load_file(tmp_path / "out" / "model.safetensors")
    n_tokens = len(origin["lm_head.weight"])
    for name, tensor in merged.items():
        both = adapted[name].double()
        if name in VOCABULARY_TENSORS:  # no other model has the rows of the added tokens
            both = torch.cat([both, wanted[name][n_tokens:]])
        torch.testing.assert_close(tensor.double(), (wanted[name] + both) / 2, rtol=1e-6, atol=1e-7)


def test_an_adapter_that_changes_rows_of_tokens_is_refused(tmp_path: Path) -> None:
    base = save_expert(tmp_path / "base")
    save_expert(tmp_path / "full", added=["<one>"], seed=1)
    get_peft_model(base, LoraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(tmp_path / "adapter")
    models = [tmp_path / "full", tmp_path / "adapter"]
    with pytest.raises(CheckpointError, match="is an adapter that changes them"):
        plan_of(models, tmp_path / "base", tokenizer_source="union")
    save_expert(tmp_path / "full", seed=1)  # with equal tokens no rows are matched
    plan_of(models, tmp_path / "base", tokenizer_source="union").close()


def test_an_adapter_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    save_expert(tmp_path / "base")
    save_expert(tmp_path / "full", special=["<b>"], seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<a>"])
    model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(3)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    for source in ("union", "2"):
        with pytest.raises(MergeError) as refused:
            plan_of([tmp_path / "full", tmp_path / "adapter"], tmp_path / "base", tokenizer_source=source)
    code = code_in(refused.value).replace("ITS BASE MODEL", str(tmp_path / "base"))
    exec(code.replace("with-adapter", str(tmp_path / "with-adapter")), {})
    experts = [tmp_path / "full", tmp_path / "with-adapter"]
    merge(experts, tmp_path / "out", tmp_path / "base", tokenizer_source="union", method="linear")
    row = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"][vocabulary_of(tmp_path / "out")["<a>"]]
    assert torch.equal(row, tuned.get_output_embeddings().weight[290].detach())


def test_a_class_that_is_not_known_is_refused(tmp_path: Path) -> None:
    for name, special in (("a", []), ("b", ["<turn>"])):
        save_expert(tmp_path / name, special=special)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"architectures": ["Mine"]}))
    with pytest.raises(CheckpointError, match=r"nothing tells which of their tensors have a row for every .*'Mine'"):
        plan_of([tmp_path / "a", tmp_path / "b"], tokenizer_source="union")


def test_a_tensor_that_may_have_rows_of_tokens_is_refused(tmp_path: Path) -> None:
    """Heads of further predicted tokens, say, which the class does not load."""
    for name, special in (("a", []), ("b", ["<turn>"])):
        save_expert(tmp_path / name, special=special)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.layers.1.shared_head.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.shared_head\.weight of .* may have a row for every"):
        plan_of([tmp_path / "a", tmp_path / "b"], tokenizer_source="union")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tokenizer_source": "base"}, "`tokenizer_source=base` needs a base model"),
        (
            {"tokenizer_source": "nobody"},
            "`tokenizer_source=nobody` names no model of this merge: expected one of union",
        ),
        ({"settings_from": "3"}, "`settings_from=3` names no model"),
        ({"settings_from": "union"}, "`settings_from=union` names no model"),
        ({"pad_to_multiple_of": 8}, "set that, too .--tokenizer-source base"),
        ({"tokenizer_source": "union", "pad_to_multiple_of": 0}, "`pad_to_multiple_of` must be at least 1"),
        (
            {"tokenizer_source": "union", "take": ["lm_head=2"]},
            "`take` has lm_head.weight, .291, 16., whose",
        ),
        ({"tokenizer_source": "union", "do_eval": True}, "`evaluate_experts` compares outputs over one vocabulary"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    save_expert(tmp_path / "a")
    save_expert(tmp_path / "b", special=["<turn>"])
    with pytest.raises(ArgumentError, match=reason):
        plan_of([tmp_path / "a", tmp_path / "b"], **options)


def test_an_expert_may_be_called_by_its_name_and_is_recorded_by_number(tmp_path: Path) -> None:
    save_expert(tmp_path / "a")
    save_expert(tmp_path / "b", special=["<turn>"])
    for name in ("2", "b", str(tmp_path / "b")):
        plan = plan_of([tmp_path / "a", tmp_path / "b"], tokenizer_source=name, settings_from=name)
        assert (plan.args.tokenizer_source, plan.args.settings_from) == ("2", "2")


# Settings


def test_the_settings_of_an_expert_with_the_tokens_of_all(tmp_path: Path, chat_family: Any) -> None:
    experts, base = chat_family
    save_expert(tmp_path / "more", special=["<first>"], seed=4)  # so that ids of the chat expert move
    merge([tmp_path / "more", *experts], tmp_path / "out", base, tokenizer_source="union", settings_from="chat")
    ids = vocabulary_of(tmp_path / "out")
    assert [ids[token] for token in ("<first>", "<turn>", "<end>")] == [290, 291, 292]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.chat_template, tokenizer.eos_token, tokenizer.eos_token_id) == (TEMPLATE, "<end>", 292)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.suppress_tokens) == ([292, 0], [291, 5])
    assert generation.temperature == 0.3
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (292, 293)
    talk = tokenizer.apply_chat_template([{"content": "hello"}], tokenize=True, return_dict=False)
    assert talk == [*tokenizer("hello").input_ids, 291]
    assert verify(str(tmp_path / "out")).ok


def test_the_tokens_of_an_expert_come_with_its_settings(tmp_path: Path, chat_family: Any) -> None:
    experts, base = chat_family
    merge(experts, tmp_path / "out", base, tokenizer_source="chat")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (experts[1] / name).read_bytes()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (291, 292)


def test_ids_of_the_base_follow_its_tokens(tmp_path: Path) -> None:
    """With the tokens of an expert and the settings of the base, the base's ids are translated."""
    save_expert(tmp_path / "base", special=["<end>"], eos="<end>")
    save_expert(tmp_path / "a", renumbered(bpe()), special=["<first>", "<end>"], seed=1)
    save_expert(tmp_path / "b", special=["<end>"], seed=2)
    merge(
        [tmp_path / "a", tmp_path / "b"],
        tmp_path / "out",
        tmp_path / "base",
        tokenizer_source="1",
        settings_from="base",
    )
    ids = vocabulary_of(tmp_path / "out")
    assert ids == vocabulary_of(tmp_path / "a") and ids["<end>"] == 291
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 291
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<end>"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 291


def test_settings_that_need_a_token_which_is_left_out_are_refused(chat_family: Any) -> None:
    experts, base = chat_family
    with pytest.raises(CheckpointError, match=r"does not have the token '<end>', which is the eos_token of .*union"):
        plan_of(experts, base, tokenizer_source="base", settings_from="chat")
    with pytest.raises(CheckpointError, match=r"have different tokens \(290 and 292\).*--tokenizer-source base"):
        plan_of([experts[0], experts[0]], experts[1], settings_from="1")


def test_settings_alone_change_files_and_no_weights(tmp_path: Path) -> None:
    for seed, (name, template) in enumerate((("base", None), ("a", "{{ a }}"), ("b", "{{ b }}"))):
        save_expert(tmp_path / name, special=["<end>"], seed=seed, template=template)
    GenerationConfig(eos_token_id=[290, 0]).save_pretrained(tmp_path / "b")
    experts, base = [tmp_path / "a", tmp_path / "b"], tmp_path / "base"
    merge(experts, tmp_path / "without", base)
    plan = merge(experts, tmp_path / "out", base, settings_from="b")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ b }}"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [290, 0]
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "without" / weights).read_bytes()
    assert any("The chat template of" in note and "b' (taken)" in note for note in plan.notes)
    assert verify(str(tmp_path / "out")).ok


def test_settings_of_an_adapter(tmp_path: Path) -> None:
    save_expert(tmp_path / "base")
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"]))
        torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        model.save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        tokenizer.chat_template = f"{{{{ {name} }}}}"
        tokenizer.save_pretrained(tmp_path / name)
    experts = [tmp_path / "a", tmp_path / "b"]
    merge(experts, tmp_path / "none")
    assert not (tmp_path / "none/chat_template.jinja").exists()
    for out, options in (("adapter", {}), ("full", {"adapter_output": "merged"})):
        merge(experts, tmp_path / out, tmp_path / "base", settings_from="b", **options)
        assert AutoTokenizer.from_pretrained(tmp_path / out).chat_template == "{{ b }}"
        assert verify(str(tmp_path / out)).ok


def test_the_command_line_shows_what_becomes_of_tokens(tmp_path: Path, chat_family: Any) -> None:
    experts, base = chat_family
    asked = [*map(str, experts), "--base-model", str(base), "--tokenizer-source", "union", "--settings-from", "chat"]
    asked += ["--pad-to-multiple-of", "8", "--output-dir", str(tmp_path / "out")]
    for command in ("plan", "merge"):
        done = CliRunner().invoke(main, [command, *asked], env={"COLUMNS": "4000"})
        assert done.exit_code == 0, done.output
        assert "Tokens: 292 in 296 rows (union), by token in 2 tensors; filled in 2 for " in done.output
        assert "4 rows of padding added." in done.output
    card = (tmp_path / "out/README.md").read_text()
    assert "tokenizer_source" in card and "are merged token by token: 292 tokens in 296 rows" in card
    assert str(tmp_path) not in card
