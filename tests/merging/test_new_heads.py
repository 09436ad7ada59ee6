"""Adapters that carry the head of a task, which their base does not have: against PEFT's own merged models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.operands.open_inputs import open_tensors
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.verify import verify

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "pad_token_id": 0}
POSITIONS = {"max_position_embeddings": 20}
IDS = torch.arange(1, 13).view(1, -1)
CASES: dict[str, tuple[Any, Any, Any, str, list[str]]] = {
    "causal": (LlamaForCausalLM, LlamaConfig(**SIZES), AutoModelForSequenceClassification, "SEQ_CLS", ["q_proj"]),
    "encoder": (BertModel, BertConfig(**SIZES, **POSITIONS), AutoModelForSequenceClassification, "SEQ_CLS", ["query"]),
    "two layers": (
        RobertaModel,
        RobertaConfig(**SIZES, max_position_embeddings=20),
        AutoModelForSequenceClassification,
        "SEQ_CLS",
        ["query"],
    ),
    "tokens": (
        BertForMaskedLM,
        BertConfig(**SIZES, **POSITIONS),
        AutoModelForTokenClassification,
        "TOKEN_CLS",
        ["value"],
    ),
}


def save_base(folder: Path, case: str) -> None:
    torch.manual_seed(0)
    CASES[case][0](CASES[case][1]).save_pretrained(folder)


def save_adapter(base: Path, folder: Path, case: str, seed: int, num_labels: int = 3) -> Any:
    """Train nothing, but fill factors and head with numbers; return the model PEFT folds the adapter into."""
    _, _, auto, task, targets = CASES[case]
    torch.manual_seed(0)
    model = get_peft_model(
        auto.from_pretrained(base, num_labels=num_labels),
        LoraConfig(task_type=task, r=2, target_modules=targets, init_lora_weights=False),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


def merge(experts: list[Path], out: Path, base: Path | None, **options: Any) -> Any:
    plan = build_plan(
        list(map(str, experts)), MergingArguments(str(out), **options), None, str(base) if base else None
    )
    run_merge(plan, StepObserver(), Processes())
    return plan


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("space", ["deltas", "weights"])
@pytest.mark.parametrize("case", CASES)
def test_the_head_is_merged_with_the_rest(tmp_path: Path, case: str, space: str) -> None:
    save_base(tmp_path / "base", case)
    wanted = [save_adapter(tmp_path / "base", tmp_path / name, case, seed) for seed, name in enumerate("ab")]
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tmp_path / "base", method="linear", space=space)
    merged, info = CASES[case][2].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.config.num_labels == 3 and type(merged) is type(wanted[0])
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [type(merged).__name__]
    one, two = (model.state_dict() for model in wanted)
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point():
            mean = (one[name].double() + two[name].double()) / 2
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)
    assert any("The adapters bring along" in note and "3 labels" in note for note in plan.notes)
    assert verify(tmp_path / "out").ok


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["karcher", "nre", "ties"])
def test_every_method_gives_back_the_head_of_equal_adapters(tmp_path: Path, method: str) -> None:
    save_base(tmp_path / "base", "causal")
    wanted = save_adapter(tmp_path / "base", tmp_path / "a", "causal", 1)
    options = {"density": 1.0} if method == "ties" else {}
    merge([tmp_path / "a"] * 2, tmp_path / "out", tmp_path / "base", method=method, **options)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_heads_that_have_no_mean_are_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "causal")
    save_adapter(tmp_path / "base", tmp_path / "a", "causal", 1)
    save_adapter(tmp_path / "base", tmp_path / "five", "causal", 2, num_labels=5)
    plain = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    plain.save_pretrained(tmp_path / "plain")
    for other, sentence in (
        ("five", r"differ in size: score\.weight is \[3, 16\] and \[5, 16\]"),
        ("plain", r"a head that its base does not have, and .*plain' brings none"),
        ("base", r"a head that its base does not have, and .*base' brings none"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            merge([tmp_path / "a", tmp_path / other], tmp_path / "out", tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"score\.weight\), which a merged adapter cannot carry"):
        merge([tmp_path / "a"] * 2, tmp_path / "out", tmp_path / "base", adapter_output="adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_head_may_have_more_labels_than_its_inner_layer(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "two layers")
    save_adapter(tmp_path / "base", tmp_path / "a", "two layers", 1, num_labels=20)
    merge([tmp_path / "a"] * 2, tmp_path / "out", tmp_path / "base")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 20


@pytest.mark.filterwarnings("ignore")
def test_what_was_random_when_the_adapter_was_trained_is_named(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SIZES, **POSITIONS)).save_pretrained(tmp_path / "base")  # without a pooler
    save_adapter(tmp_path / "base", tmp_path / "a", "encoder", 1)
    with pytest.raises(CheckpointError, match=r"also has bert\.pooler\.dense\.bias.* was random when"):
        merge([tmp_path / "a"] * 2, tmp_path / "out", tmp_path / "base")


@pytest.mark.filterwarnings("ignore")
def test_a_head_of_an_unknown_task_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "causal")
    wanted = save_adapter(tmp_path / "base", tmp_path / "a", "causal", 1)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text()) | {"task_type": None}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no class with this head for its task_type None") as refused:
        merge([tmp_path / "a"] * 2, tmp_path / "out", tmp_path / "base")
    code = "\n".join(line[4:] for line in str(refused.value).splitlines() if line.startswith("    "))
    code = code.replace("THE BASE", str(tmp_path / "base")).replace("THE ADAPTER", str(tmp_path / "a"))
    exec(code.replace("NUMBER", "3").replace('"with-head"', repr(str(tmp_path / "with-head"))), {})
    merge([tmp_path / "with-head"] * 2, tmp_path / "out", None)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_a_callback_skips_is_copied_from_the_first_adapter(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "causal")
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / "base", tmp_path / name, "causal", seed)
    args = MergingArguments(str(tmp_path / "out"))
    plan = build_plan([str(tmp_path / name) for name in "ab"], args, None, str(tmp_path / "base"))
    [step] = [step for step in plan.steps if step.name == "score.weight"]
    only = open_tensors(plan, plan.copied(step)).dense[0].read(0, step.numel)
    stored = load_file(tmp_path / "a/adapter_model.safetensors")["base_model.model.score.weight"]
    assert only.data.tobytes() == stored.numpy().tobytes()
    plan.close()


@pytest.mark.filterwarnings("ignore")
def test_the_output_is_that_of_peft_with_one_adapter(tmp_path: Path) -> None:
    save_base(tmp_path / "base", "encoder")
    save_adapter(tmp_path / "base", tmp_path / "a", "encoder", 1)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    wanted = PeftModel.from_pretrained(whole, tmp_path / "a").eval()
    merge([tmp_path / "a"] * 2, tmp_path / "out", tmp_path / "base")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, wanted(IDS).logits, rtol=1e-4, atol=1e-5)
