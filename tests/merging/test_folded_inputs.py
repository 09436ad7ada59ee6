"""Adapters without low-rank factors, and models with an adapter on them, merged as full models."""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from click_runner import click_runner
from jsonschema import Draft202012Validator
from peft import LoHaConfig, LoraConfig, PeftModel, TinyLoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_frmerge.cli.main import main
from hf_frmerge.merging.record.manifest import SCHEMA_FILE, read_manifest
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_local_experts", "tie_word_embeddings",
)  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "loha": LoHaConfig(r=4, target_modules=TARGETS),
    "lora": LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "whole": LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
}


def save_adapter(base: str, config: Any, folder: Path, seed: int = 1) -> str:
    torch.manual_seed(seed)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data * 0.9 + 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tmp_path: Path) -> str:
    torch.manual_seed(0)
    LlamaForCausalLM(LLAMA).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def other(tmp_path: Path, base: str) -> str:
    """A full fine-tune of the base."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def whole(base: str, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """Weights in float64, of the base with an adapter."""
    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).double().merge_and_unload()
    return dict(model.state_dict())


def merge(*arguments: str, method: str = "linear") -> Result:
    result = click_runner().invoke(main, ["merge", *arguments, "--method", method])
    assert result.exit_code == 0, result.output
    return result


def check_mean(output: str, models: Sequence[dict[str, torch.Tensor]]) -> None:
    merged = load_file(f"{output}/model.safetensors")
    assert merged.keys() == models[0].keys()
    for name, tensor in merged.items():
        mean = torch.stack([model[name] for model in models]).mean(0)
        assert tensor.dtype == torch.bfloat16
        # One rounding, of a sum that is right to float32: it may fall on either side of a tie.
        torch.testing.assert_close(tensor.double(), mean, rtol=2**-8 * 1.01, atol=1e-7)
        assert (tensor != mean.to(torch.bfloat16)).float().mean() < 0.01, name


def test_adapters_of_two_kinds_are_merged_over_their_base(base: str, tmp_path: Path) -> None:
    loha = save_adapter(base, ADAPTERS["loha"], tmp_path / "loha", 1)
    lora = save_adapter(base, ADAPTERS["lora"], tmp_path / "lora", 2)
    out = str(tmp_path / "out")
    shown = merge(loha, lora, "--base-model", base, "--output-dir", out).stderr
    assert "is an adapter of kind LOHA: PEFT folds it into" in " ".join(shown.split())
    check_mean(out, [whole(base, loha), whole(base, lora)])
    manifest = read_manifest(out)
    assert [model.kind for model in manifest.experts] == ["adapter", "adapter"]
    assert manifest.experts[0].files.keys() == {"adapter_model.safetensors", "adapter_config.json"}
    # What no adapter changes is copied, as for LoRA.
    untouched = manifest.tensors["model.embed_tokens.weight"]
    assert (untouched.action, untouched.donor) == ("copy", -1)
    assert manifest.report.accounts[0].n_tensors == len(load_file(f"{base}/model.safetensors")) + len(
        load_file(f"{loha}/adapter_model.safetensors")
    )
    assert verify(out).ok
    assert reproduce(out, str(tmp_path / "again")).identical


def test_factors_of_stacks_are_merged_over_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    sizes = {**LLAMA.to_dict(), "num_local_experts": 4, "tie_word_embeddings": False}
    torch.manual_seed(0)
    base = str(tmp_path / "base")
    MixtralForCausalLM(MixtralConfig(**{key: sizes[key] for key in SIZES})).save_pretrained(base)
    stacks = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    adapters, wanted = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(MixtralForCausalLM.from_pretrained(base), LoraConfig(r=2, lora_alpha=3, **stacks))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn_like(parameter)
        adapters.append(str(tmp_path / f"a{seed}"))
        model.save_pretrained(adapters[-1])
        double: Any = MixtralForCausalLM.from_pretrained(base, dtype=torch.float64)
        wanted.append(PeftModel.from_pretrained(double, adapters[-1]).double().merge_and_unload().state_dict())
    outputs = {"both": [0.5, 0.5], "one": [1.0, 0.0]}
    for name, weights in outputs.items():
        out = str(tmp_path / name)
        merge(*adapters[: 2 if name == "both" else 1], "--base-model", base, "--output-dir", out)
        # One by one, as the base stores them.
        assert load_file(f"{out}/model.safetensors").keys() == load_file(f"{base}/model.safetensors").keys()
        merged = MixtralForCausalLM.from_pretrained(out).state_dict()
        for key, tensor in merged.items():
            mean = sum(weight * each[key] for weight, each in zip(weights, wanted))
            torch.testing.assert_close(tensor.double(), mean, rtol=2**-22, atol=1e-8)
        assert verify(out).ok
    assert reproduce(out, str(tmp_path / "again")).identical


def test_one_adapter_of_another_kind_is_folded_in(base: str, tmp_path: Path) -> None:
    loha = save_adapter(base, ADAPTERS["loha"], tmp_path / "loha")
    out = str(tmp_path / "out")
    merge(loha, "--base-model", base, "--output-dir", out)
    check_mean(out, [whole(base, loha)])


def test_a_method_of_deltas_takes_them(base: str, tmp_path: Path) -> None:
    loha, again = (save_adapter(base, ADAPTERS["loha"], tmp_path / str(seed), seed) for seed in (1, 2))
    out = str(tmp_path / "out")
    merge(loha, again, "--base-model", base, "--output-dir", out, method="task_arithmetic")
    first, second, origin = whole(base, loha), whole(base, again), whole(base)
    merged = load_file(f"{out}/model.safetensors")
    manifest = read_manifest(out)
    assert manifest.space == "deltas"
    scale = manifest.arguments["scale"]
    for name, tensor in merged.items():
        wanted = origin[name] + scale * (first[name] + second[name] - 2 * origin[name])
        torch.testing.assert_close(tensor.double(), wanted, rtol=2**-8 * 1.01, atol=1e-7)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_model_with_an_adapter_is_one_expert(
    base: str, other: str, kind: str, is_first: bool, tmp_path: Path
) -> None:
    adapter = save_adapter(base, ADAPTERS[kind], tmp_path / kind)
    pair, out = f"{base}+{adapter}", str(tmp_path / "out")
    experts = [pair, other] if is_first else [other, pair]
    shown = merge(*experts, "--output-dir", out).stderr
    assert "is merged as one model: its adapter is folded in" in " ".join(shown.split())
    check_mean(out, [whole(base, adapter), whole(other)])
    assert verify(out).ok
    assert reproduce(out, str(tmp_path / "again")).identical
    manifest = json.loads(Path(out, "merge_manifest.json").read_text())
    schema = json.loads(files("hf_frmerge").joinpath("merging/record", SCHEMA_FILE).read_text())
    Draft202012Validator(schema).validate(manifest)
    (recorded,) = [model for model in manifest["experts"] if "adapter" in model]
    assert (recorded["id"], recorded["adapter"]["id"]) == ("base", kind)
    assert "adapter_model.safetensors" in recorded["adapter"]["files"]
    assert "model.safetensors" in recorded["files"]
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("method", ["karcher", "ties", "tsv_m"])
def test_every_kind_of_method_sees_the_folded_model(base: str, other: str, method: str, tmp_path: Path) -> None:
    """In float32 there is next to nothing to be rounded in between, so folding first gives the same."""
    wide = str(tmp_path / "wide")
    LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(wide)
    adapter = save_adapter(wide, ADAPTERS["lora"], tmp_path / "lora")
    merge(adapter, "--base-model", wide, "--output-dir", str(tmp_path / "folded"))
    for expert, out in ((f"{wide}+{adapter}", "pair"), (str(tmp_path / "folded"), "first")):
        merge(expert, other, "--base-model", wide, "--output-dir", str(tmp_path / out), method=method)
    pair, first = (load_file(tmp_path / out / "model.safetensors") for out in ("pair", "first"))
    for name, tensor in pair.items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-5, atol=1e-6)


def test_two_adapters_on_one_base_are_two_models(base: str, tmp_path: Path) -> None:
    one, two = (save_adapter(base, ADAPTERS["loha"], tmp_path / str(seed), seed) for seed in (1, 2))
    for experts in ([one, two, "--base-model", base], [f"{base}+{one}", f"{base}+{two}"]):
        result = click_runner().invoke(main, ["plan", *experts])
        assert result.exit_code == 0, result.output
        assert "is listed twice" not in result.output
    again = click_runner().invoke(main, ["plan", f"{base}+{one}", f"{base}+{one}"])
    assert "is listed twice" in " ".join(again.output.split())


def test_a_pair_alone_is_folded(base: str, tmp_path: Path) -> None:
    adapter = save_adapter(base, ADAPTERS["lora"], tmp_path / "lora")
    out = str(tmp_path / "out")
    merge(f"{base}+{adapter}", "--output-dir", out)
    check_mean(out, [whole(base, adapter)])


def test_the_adapter_of_a_pair_may_change_another_base(base: str, other: str, tmp_path: Path) -> None:
    adapter = save_adapter(other, ADAPTERS["lora"], tmp_path / "of-other", 3)
    lora = save_adapter(base, ADAPTERS["lora"], tmp_path / "lora", 4)
    out = str(tmp_path / "out")
    merge(f"{other}+{adapter}", lora, "--base-model", base, "--output-dir", out)
    check_mean(out, [whole(other, adapter), whole(base, lora)])


def test_nothing_is_rounded_in_between(base: str, tmp_path: Path) -> None:
    """A change below half a unit in the last place of bfloat16 is lost by folding first, and not here."""
    adapter = save_adapter(base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "small")
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    from safetensors.torch import save_file

    small = {name: value * (1e-4 if "lora_B" in name else 1) for name, value in tensors.items()}
    save_file(small, f"{adapter}/adapter_model.safetensors", {"format": "pt"})
    out = str(tmp_path / "out")
    merge(f"{base}+{adapter}", base, "--output-dir", out, "--dtype", "float32")
    origin, folded = whole(base), whole(base, adapter)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (folded[name].to(torch.bfloat16).double() == origin[name]).float().mean() > 0.9
    merged = load_file(f"{out}/model.safetensors")[name].double()
    torch.testing.assert_close(merged, (origin[name] + folded[name]) / 2, rtol=2e-7, atol=0)
    assert not torch.equal(merged, origin[name])


def test_an_adapter_that_changes_while_it_is_read_is_noticed(base: str, other: str, tmp_path: Path) -> None:
    adapter = save_adapter(base, ADAPTERS["lora"], tmp_path / "lora")
    out = str(tmp_path / "out")
    merge(f"{base}+{adapter}", other, "--output-dir", out)
    save_adapter(base, ADAPTERS["lora"], tmp_path / "lora", 9)
    assert not verify(out).ok


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (["{base}+{other}", "{other}"], "expected a full model and an adapter on it"),
        (["{lora}+{base}", "{other}"], "expected a full model and an adapter on it"),
        (["{loha}", "{lora}"], "is an adapter of kind LOHA, which is more than low-rank factors"),
        (
            ["{loha}", "{lora}", "--base-model", "{base}", "--adapter-output", "adapter"],
            "is more than low-rank factors",
        ),
        (["{lora}", "--base-model", "{base}+{lora}"], "which a merge takes as one expert, but nothing else does"),
    ],
)
def test_what_does_not_fit_is_refused(base: str, other: str, experts: list[str], message: str, tmp_path: Path) -> None:
    names = {"base": base, "other": other}
    names |= {kind: save_adapter(base, ADAPTERS[kind], tmp_path / kind) for kind in ("loha", "lora")}
    given = [name.format(**names) for name in experts]
    result = click_runner().invoke(main, ["merge", *given, "--output-dir", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_other_commands_say_how_to_make_one_model_of_a_pair(base: str, tmp_path: Path) -> None:
    lora = save_adapter(base, ADAPTERS["lora"], tmp_path / "lora")
    arguments = ["extract-lora", f"{base}+{lora}", "--base-model", base, "--output-dir", str(tmp_path / "extracted")]
    result = click_runner().invoke(main, arguments)
    assert result.exit_code != 0
    command = " ".join(result.stderr.split()).split("(`")[1].split("`)")[0]
    folding = [str(tmp_path / "folded") if word == "folded" else word for word in shlex.split(command)[1:]]
    assert click_runner().invoke(main, folding).exit_code == 0
    check_mean(str(tmp_path / "folded"), [whole(base, lora)])


def test_what_peft_takes_of_the_base_is_refused_with_advice_that_works(base: str, tmp_path: Path) -> None:
    """TinyLoRA's factors are singular vectors of the base, found when it is put on."""
    adapter = save_adapter(base, TinyLoraConfig(target_modules=TARGETS), tmp_path / "tiny")
    arguments = ["merge", adapter, "--base-model", base, "--output-dir", str(tmp_path / "out")]
    result = click_runner().invoke(main, arguments)
    assert result.exit_code != 0 and "If PEFT can fold it into its base as a whole" in result.stderr
    advice = result.stderr.split("do that once:\n")[1].split("and pass")[0]
    code = "\n".join(line.strip() for line in advice.splitlines())
    for said, meant in (("ITS BASE MODEL", base), ("THIS ADAPTER", adapter), ("folded", str(tmp_path / "folded"))):
        code = code.replace(f'"{said}"', repr(meant))
    exec(code, {})
    merge(str(tmp_path / "folded"), base, "--output-dir", str(tmp_path / "out"))
    assert sys.modules["peft"]
