"""RegMean and RegMean++ of small models, against least squares in float64 on the inputs of transformers' layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click_runner import click_runner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration import inputs
from hf_frmerge.calibration.baselines.regmean import shrunk
from hf_frmerge.calibration.prompts.read_prompts import read_prompts, split_prompts
from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify
from hf_frmerge.wording.numbers import number as shown

VOCABULARY, LENGTH, N_PROMPTS = 40, 12, 24
WEIGHTS = [0.6, 0.4]


def prompts(expert: int) -> list[list[int]]:
    ids: list[list[int]] = np.random.default_rng(expert).integers(0, VOCABULARY, (N_PROMPTS, LENGTH)).tolist()
    return ids


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def moved(model: Any, seed: int) -> Any:
    """Another model near by."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (parameter.std() + 0.1))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each architecture a base, two full fine-tunes and two adapters."""
    root = tmp_path_factory.mktemp("models")
    for kind, make in (("llama", llama), ("gpt2", gpt2)):
        make(0).save_pretrained(root / kind / "base")
        for number in range(2):
            moved(make(0), number + 1).save_pretrained(root / kind / f"full{number}")
            base = make(0)
            torch.manual_seed(number)
            targets = "all-linear" if kind == "llama" else ["c_attn", "c_proj", "c_fc"]
            lora = LoraConfig(
                r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False, fan_in_fan_out=kind == "gpt2"
            )
            get_peft_model(base, lora).save_pretrained(root / kind / f"lora{number}")
    return root


def merger(folder: Path, out: Path, kind: str = "full", **options: Any) -> FisherRaoMerger:
    experts = [str(folder / f"{kind}{number}") for number in range(2)]
    calibration = options.pop("calibration", {expert: prompts(i) for i, expert in enumerate(experts)})
    defaults = {
        "method": "regmean", "max_calibration_length": LENGTH, "disable_tqdm": True, "calibration_batch_size": 5,
        "adapter_output": "merged" if kind == "lora" else "auto", "dtype": "float32",
    }  # fmt: skip
    args = MergingArguments(output_dir=str(out), **{**defaults, **options})
    return FisherRaoMerger(
        experts, args, weights=WEIGHTS, base_model=str(folder / "base"), calibration_dataset=calibration
    )


# An independent reference: whole models in float64, inputs by hooks, one row for every token.


def linear_layers(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and "lm_head" not in name
    }


def whole_models(folder: Path, kind: str) -> list[Any]:
    found = []
    for number in range(2):
        if kind == "lora":
            base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
            found.append(PeftModel.from_pretrained(base, folder / f"lora{number}").merge_and_unload().double().eval())
        else:
            found.append(AutoModelForCausalLM.from_pretrained(folder / f"full{number}", dtype=torch.float64).eval())
    return found


def matrix(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def inputs_of(model: Any, used: list[list[int]]) -> dict[str, Tensor]:
    """What enters every linear layer of a model, one row a token."""
    rows: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(args[0][0]))
        for name, layer in linear_layers(model).items()
    ]
    with torch.no_grad():
        for ids in used:
            model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def average_of(experts: list[Any]) -> Any:
    merged = type(experts[0])(experts[0].config).double().eval()
    states = [expert.state_dict() for expert in experts]
    merged.load_state_dict({n: sum(w * s[n] for w, s in zip(WEIGHTS, states)) for n in states[0]})
    return merged


def solved(inputs: list[Tensor], weights: list[Tensor], off_diagonal: float) -> Tensor:
    """Minimise sum_i w_i |X_i (W - W_i)^T|^2 / T_i; the part of the diagonal is rows of its own."""
    rows, targets = [], []
    for share, x, weight in zip(WEIGHTS, inputs, weights):
        scaled = x * (share / len(x)) ** 0.5
        diagonal = torch.diag(scaled.square().sum(0).sqrt())
        for part in (off_diagonal**0.5 * scaled, (1 - off_diagonal) ** 0.5 * diagonal):
            rows.append(part)
            targets.append(part @ weight.T)
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T


def put(layer: Any, weight: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight.T if type(layer).__name__ == "Conv1D" else weight)


def regmean(experts: list[Any], used: list[list[list[int]]], off_diagonal: float) -> Any:
    merged = average_of(experts)
    inputs = [inputs_of(expert, ids) for expert, ids in zip(experts, used)]
    for name, layer in linear_layers(merged).items():
        weights = [matrix(linear_layers(expert)[name]) for expert in experts]
        put(layer, solved([x[name] for x in inputs], weights, off_diagonal))
    return merged


def regmean_plus_plus(experts: list[Any], used: list[list[list[int]]], off_diagonal: float) -> Any:
    """Block by block: an expert's block runs behind the merged blocks below it."""
    merged = average_of(experts)
    for block in range(2):
        inputs = []
        for expert, ids in zip(experts, used):
            hybrid = average_of(experts)
            own = {n: v for n, v in expert.state_dict().items() if f".{block}." in n}
            hybrid.load_state_dict(merged.state_dict() | own)
            inputs.append(inputs_of(hybrid, ids))
        for name, layer in linear_layers(merged).items():
            if f".{block}." in name:
                weights = [matrix(linear_layers(expert)[name]) for expert in experts]
                put(layer, solved([x[name] for x in inputs], weights, off_diagonal))
    return merged


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply in float32 whatever the processor can do, to compare with float64 closely."""
    monkeypatch.setattr(inputs, "_compute_dtype", lambda _: torch.float32)


def used_prompts(folder: Path, kind: str) -> list[list[list[int]]]:
    """The prompts of every expert that are not held out."""
    names = [str(folder / f"{kind}{number}") for number in range(2)]
    read = read_prompts(
        {name: prompts(number) for number, name in enumerate(names)}, None, experts=names,
        n_samples=64, max_length=LENGTH, seed=42, vocab_size=VOCABULARY,
    )  # fmt: skip
    return [[ids.tolist() for ids in own.token_ids] for own in split_prompts(read, 1 / 8, 42)[0]]


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("method", ["regmean", "regmean++"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_linear_layer_is_the_least_squares_solution(
    models: Path, tmp_path: Path, architecture: str, kind: str, method: str
) -> None:
    folder, options = models / architecture, {"off_diagonal": 0.4} if architecture == "gpt2" else {}
    merger(folder, tmp_path / "out", kind, method=method, **options).merge()
    reference = {"regmean": regmean, "regmean++": regmean_plus_plus}[method]
    expected = reference(whole_models(folder, kind), used_prompts(folder, kind), options.get("off_diagonal", 0.9))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).state_dict()
    average = average_of(whole_models(folder, kind)).state_dict()
    assert expected.state_dict().keys() == merged.keys()
    solved_layers = {f"{name}.weight" for name in linear_layers(expected)}
    for name, tensor in expected.state_dict().items():
        size = float(tensor.std())
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-4 * size)
        # What is no linear layer is averaged, and the prompts make a difference to what is one.
        assert (float((tensor - average[name]).abs().max()) > 1e-3 * size) == (name in solved_layers)

    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.form == "dense" and record.options["method"] == method
    report = verify(str(tmp_path / "out"))
    assert report.ok, report.problems
    assert not reproduce(str(tmp_path / "out")).differences


@pytest.mark.usefixtures("in_float32")
def test_adapters_are_merged_into_an_adapter_without_loss(models: Path, tmp_path: Path) -> None:
    """The merged delta is a sum of what the experts' factors give, so its rank is no more than the sum of theirs."""
    folder = models / "gpt2"
    merger(folder, tmp_path / "adapter", "lora", adapter_output="auto").merge()
    merger(folder, tmp_path / "whole", "lora").merge()
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-4)
    assert verify(str(tmp_path / "adapter")).ok


@pytest.mark.usefixtures("in_float32")
def test_scales_and_weights_of_single_tensors_count(models: Path, tmp_path: Path) -> None:
    folder = models / "llama"
    merger(folder, tmp_path / "plain").merge()
    options = {"space": "deltas", "scale": 1.5, "layer_scales": "1:2"}
    merger(folder, tmp_path / "scaled", weight_rules=[r".*\.1\.mlp\..*=1,0"], **options).merge()
    plain, scaled = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "scaled"))
    base, first = (load_file(folder / name / "model.safetensors") for name in ("base", "full0"))
    for name, tensor in scaled.items():
        merged = first[name] if ".1.mlp." in name else plain[name]  # all of the weight: the expert's own layer
        factor = 1.5 * (2 if ".1." in name else 1)
        torch.testing.assert_close(tensor, base[name] + factor * (merged - base[name]), rtol=1e-4, atol=1e-4)


def test_what_is_off_the_diagonal_is_multiplied() -> None:
    gram = torch.arange(1.0, 10).reshape(3, 3)
    expected = torch.tensor([[1.0, 1.0, 1.5], [2.0, 5.0, 3.0], [3.5, 4.0, 9.0]])
    torch.testing.assert_close(shrunk(gram, 0.5), expected)


def test_without_prompts_it_is_refused_before_anything_is_written(models: Path, tmp_path: Path) -> None:
    folder, out = models / "llama", tmp_path / "out"
    with pytest.raises(ArgumentError, match="'regmean'` asks what the experts do on prompts, and there are none"):
        merger(folder, out, calibration=None).merge()
    args = MergingArguments(output_dir=str(out), method="regmean")
    with pytest.raises(ArgumentError, match="asks what the experts do on prompts"):  # before any model is looked for
        FisherRaoMerger(["nobody/has-this", "nobody/has-that"], args).merge()
    experts = [str(folder / f"full{number}") for number in range(2)]
    plan = build_plan(experts, MergingArguments(output_dir=str(out), method="regmean++"))
    with pytest.raises(ArgumentError, match=r"'regmean\+\+'` asks what the experts do on prompts"):
        run_merge(plan, StepObserver(), Processes())
    with pytest.raises(ArgumentError, match=r"needs prompts of every expert, and .*full1 has none"):
        merger(folder, out, calibration={experts[0]: prompts(0)}).merge()
    with pytest.raises(ArgumentError, match=r"method='regmean' decides by their outputs\. Leave it out"):
        MergingArguments(method="regmean", post_step="svc")
    with pytest.raises(ArgumentError, match="`off_diagonal` must be at least 0 and below 1"):
        MergingArguments(method="regmean", off_diagonal=1.0)
    assert not out.exists()


def test_the_command_line_takes_the_advice_and_says_what_came_of_it(models: Path, tmp_path: Path) -> None:
    folder = models / "llama"
    experts = [str(folder / f"full{place}") for place in range(2)]
    command = ["merge", *experts, "--method", "regmean++", "--max-calibration-length", str(LENGTH)]
    command += ["--output-dir", str(tmp_path / "out"), "--disable-tqdm"]
    refused = click_runner().invoke(main, command)
    assert refused.exit_code == 2 and "--calibration FILE for all" in " ".join(refused.stderr.split())
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in prompts(0)))
    done = click_runner().invoke(main, [*command, "--calibration", str(file)])
    assert done.exit_code == 0, done.stderr
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.held_out == (3, 3)
    said = " ".join(done.stdout.split())
    assert f"is {shown(record.mean_distance('dense'))} rad², where a plain average of their weights" in said
    card = (tmp_path / "out/README.md").read_text()
    assert "combined by RegMean++, judging by what they do on 48 prompts" in card
    assert "then fitted" not in card and "--calibration PROMPTS.jsonl" in card and "--method regmean++" in card


def test_language_models_write_the_prompts_themselves(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "llama", tmp_path / "llama")
    vocabulary = {f"t{number}": number for number in range(VOCABULARY - 1)} | {"<s>": VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "t0")), bos_token="<s>")
    tokenizer.save_pretrained(folder / "base")
    merger(folder, tmp_path / "out", calibration="self", num_calibration_samples=8).merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.source == "self" and record.form == "dense" and record.prompts == (7, 7)
    assert verify(str(tmp_path / "out")).ok
