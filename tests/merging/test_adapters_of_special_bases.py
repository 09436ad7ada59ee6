"""Adapters on bases whose class decides: tied embeddings, square transposed weights, names of two versions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(**TEXT, head_dim=8),
    "gpt2": GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2),
    "gpt2-untied": GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False
    ),
    "qwen2": Qwen2Config(**TEXT),  # square projections with a bias, stored as (out, in)
    "llama": LlamaConfig(**TEXT),
}
IDS = torch.arange(12).view(1, -1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bases that leave the tie to the default of their class, as transformers 4 wrote them."""
    root = tmp_path_factory.mktemp("bases")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        written = json.loads((root / name / "config.json").read_text())
        if written["tie_word_embeddings"] == type(config)().tie_word_embeddings:
            del written["tie_word_embeddings"]
        (root / name / "config.json").write_text(json.dumps(written))
    return lambda name: root / name


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def make_adapter(base: Path, folder: Path, *, seed: int = 1, **config: Any) -> Path:
    model = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def merge(experts: list[Path], out: Path, base: Path | None = None, **options: Any) -> Any:
    args = MergingArguments(output_dir=str(out), **options)
    plan = build_plan([str(expert) for expert in experts], args, None, str(base) if base else None)
    run_merge(plan, StepObserver(), Processes())
    return plan


def check_logits(got: Any, wanted: Any, without: Any) -> None:
    """Compare two models; their difference counts against what the adapter changes."""
    with torch.no_grad():
        got, wanted, without = (model(IDS).logits for model in (got, wanted, without))
    effect = (wanted - without).norm()
    assert effect > 1e-2
    assert (got - wanted).norm() < 1e-5 * effect


TIED = {
    "gemma2": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "modules_to_save": ("gemma2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "output layer": ("gemma2", {"target_modules": ["lm_head", "q_proj"]}),
    "tied factors": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied copies": (
        "gemma2",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TIED)
def test_a_tie_that_only_the_class_knows_is_refused_and_the_advice_works(base: Any, tmp_path: Path, case: str) -> None:
    family, config = TIED[case]
    folder = base(family)
    adapter = make_adapter(folder, tmp_path / "adapter", **config)
    peft_model = PeftModel.from_pretrained(load(folder), adapter).eval()
    with pytest.raises(CheckpointError, match=r"the base ties its input embedding and its output layer") as refused:
        merge([adapter, adapter], tmp_path / "out", folder, adapter_output="merged")
    assert not (tmp_path / "out").exists()

    # What the message says, run as it stands
    lines = [line[4:] for line in str(refused.value).splitlines() if line.startswith("    ")]
    script = "\n".join(lines).replace("THE BASE", str(folder)).replace('"untied"', repr(str(tmp_path / "untied")))
    exec(script, {})
    assert {"lm_head.weight"} == load_file(tmp_path / "untied/model.safetensors").keys() - load_file(
        folder / "model.safetensors"
    ).keys()
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "untied")(IDS).logits, load(folder)(IDS).logits)
    merge([adapter, adapter], tmp_path / "out", tmp_path / "untied", adapter_output="merged")
    check_logits(load(tmp_path / "out"), peft_model, load(folder))

    if "modules_to_save" not in config:
        assert "adapter_output='adapter'" in str(refused.value)
        for name, named in {"alone": None, "with base": folder}.items():
            merge([adapter, adapter], tmp_path / name, named, adapter_output="adapter")
            assert not json.loads((tmp_path / name / "adapter_config.json").read_text())["ensure_weight_tying"]
            check_logits(PeftModel.from_pretrained(load(folder), tmp_path / name).eval(), peft_model, load(folder))
    else:
        assert "adapter_output" not in str(refused.value)  # an adapter could not carry it


def test_an_embedding_that_is_not_tied_is_merged(base: Any, tmp_path: Path) -> None:
    folder = base("gpt2")
    adapter = make_adapter(folder, tmp_path / "a", target_modules=["wpe", "c_attn"], fan_in_fan_out=True)
    merge([adapter, adapter], tmp_path / "out", folder, adapter_output="merged")
    check_logits(load(tmp_path / "out"), PeftModel.from_pretrained(load(folder), adapter).eval(), load(folder))


def test_an_output_layer_without_a_home_is_refused(base: Any, tmp_path: Path) -> None:
    """An untied output layer that the base lacks: there is nothing to put the delta on, nor a tie to excuse it."""
    adapter = make_adapter(base("llama"), tmp_path / "a", target_modules=["q_proj", "lm_head"])
    tensors = load_file(base("llama") / "model.safetensors")
    del tensors["lm_head.weight"]
    (tmp_path / "headless").mkdir()
    save_file(tensors, tmp_path / "headless/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "headless/config.json").write_text((base("llama") / "config.json").read_text())
    for output in ("adapter", "merged"):
        with pytest.raises(CheckpointError, match=r"changes lm_head\.weight, which the base model does not have"):
            merge([adapter, adapter], tmp_path / "out", tmp_path / "headless", adapter_output=output)


def test_a_delta_on_whole_numbers_is_refused(base: Any, tmp_path: Path) -> None:
    """Integer tensors are copied, so that a delta on one would be lost."""
    adapter = make_adapter(base("llama"), tmp_path / "a", target_modules=["q_proj", "v_proj"])
    tensors = load_file(base("llama") / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].mul(100).to(torch.int8)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "base/config.json").write_text((base("llama") / "config.json").read_text())
    with pytest.raises(CheckpointError, match=re.escape(name)):
        merge([adapter, adapter], tmp_path / "out", tmp_path / "base", adapter_output="merged")


SQUARE = {
    "only square": ("gpt2-untied", {"target_modules": r".*attn\.c_proj"}),
    "and a linear layer": ("gpt2-untied", {"target_modules": ["attn.c_proj", "lm_head"]}),
    "and other transposed": ("gpt2-untied", {"target_modules": ["c_proj", "c_fc"]}),
    "linear with bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "linear without bias": ("llama", {"target_modules": ["q_proj", "o_proj"]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flag", [None, False, True])
@pytest.mark.parametrize("case", SQUARE)
def test_square_weights_are_merged_as_their_class_stores_them(
    base: Any, tmp_path: Path, case: str, flag: bool | None
) -> None:
    family, config = SQUARE[case]
    folder = base(family)
    adapter = make_adapter(folder, tmp_path / "adapter", **config)
    peft_model = PeftModel.from_pretrained(load(folder), adapter).eval()
    if flag is not None:  # PEFT keeps the flag of the module it visited last
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": flag}))
    merge([adapter, adapter], tmp_path / "out", folder, adapter_output="merged")
    check_logits(load(tmp_path / "out"), peft_model, load(folder))


def test_a_square_weight_of_an_unknown_class_is_refused(base: Any, tmp_path: Path) -> None:
    folder = base("gpt2-untied")
    adapter = make_adapter(folder, tmp_path / "adapter", target_modules=r".*attn\.c_proj", fan_in_fan_out=True)
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom/model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["MyLMHeadModel"]}
    (tmp_path / "custom/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"h\.0\.attn\.c_proj' is square, and nothing tells .*merge_and_unload"):
        merge([adapter, adapter], tmp_path / "out", tmp_path / "custom", adapter_output="merged")
    for name in ("m1", "m2"):
        PeftModel.from_pretrained(load(folder), adapter).merge_and_unload().save_pretrained(tmp_path / name)
    merge([tmp_path / "m1", tmp_path / "m2"], tmp_path / "out")
    check_logits(load(tmp_path / "out"), PeftModel.from_pretrained(load(folder), adapter).eval(), load(folder))


def test_a_class_is_not_asked_where_the_tensors_tell(base: Any, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    # Two matrices of one shape outside of the layers: the class is asked about these unless the config tells.
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    adapter = make_adapter(folder, tmp_path / "a", target_modules=["q_proj", "down_proj"])  # q_proj is square
    code = (
        "import sys\nfrom hf_frmerge import FisherRaoMerger, MergingArguments\n"
        f"args = MergingArguments(output_dir={str(tmp_path / 'out')!r}, adapter_output='merged', disable_tqdm=True)\n"
        f"FisherRaoMerger([{str(adapter)!r}] * 2, args, base_model={str(folder)!r}).merge()\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# One model under the names of two versions


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One vision-language model in the names of transformers 5, and in those of repositories on the Hub."""
    root = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    vision = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**vision, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"},
    )
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(root / "old", save_original_format=True)
    model.save_pretrained(root / "new", save_original_format=False)
    names = [set(load_file(root / name / "model.safetensors")) for name in ("old", "new")]
    assert any(name.startswith("language_model.model.layers.0") for name in names[0])
    assert any(name.startswith("model.language_model.layers.0") for name in names[1])
    return {"old": root / "old", "new": root / "new"}


def vlm_adapter(base: Path, folder: Path, seed: int, names: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Adapter in the names of either version, and its deltas by PEFT, by module path in memory."""
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(base),
        LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all("model.model.language_model.layers" in name for name in tensors)
    if names == "old":
        tensors = {name.replace("model.language_model.", "language_model.model."): t for name, t in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    deltas = {
        name: module.get_delta_weight("default").detach()
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }
    return folder, deltas


def test_adapters_in_the_names_of_two_versions_need_the_base(llava: dict[str, Path], tmp_path: Path) -> None:
    (first, a), (second, b) = (
        vlm_adapter(llava["new"], tmp_path / names, seed, names) for seed, names in enumerate(("old", "new"))
    )
    message = r"'language_model\.model\.layers\.0.*may name 'model\.language_model\.layers\.0.*Pass base_model"
    with pytest.raises(CheckpointError, match=message):
        merge([first, second], tmp_path / "out", method="linear")
    for kind, folder in llava.items():
        plan = merge([first, second], tmp_path / f"adapter-{kind}", folder, method="linear")
        assert not any("zero delta" in note for note in plan.notes)
        out = tmp_path / f"merged-{kind}"
        merge([first, second], out, folder, method="linear", adapter_output="merged")
        origin, merged = (load_file(path / "model.safetensors") for path in (folder, out))
        for path, delta in a.items():
            name = path if kind == "new" else path.replace("model.language_model.", "language_model.model.")
            expected = origin[f"{name}.weight"] + 0.5 * (delta + b[path])
            torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
        assert sum(not torch.equal(merged[name], origin[name]) for name in origin) == len(a)


def test_layers_and_targets_may_differ_without_a_base(base: Any, tmp_path: Path) -> None:
    """Adapters that change different modules of one model are no adapters under two names."""
    experts = [
        make_adapter(base("llama"), tmp_path / "a", target_modules=["q_proj"], layers_to_transform=[0]),
        make_adapter(base("llama"), tmp_path / "b", target_modules=["q_proj"], layers_to_transform=[1]),
        make_adapter(base("llama"), tmp_path / "c", target_modules=["o_proj"]),
    ]
    plan = merge(experts, tmp_path / "out")
    assert len([note for note in plan.notes if "zero deltas" in note]) == 3


# One rank for runtimes that read only one


@pytest.mark.filterwarnings("ignore")
def test_ranks_that_differ_are_noted_and_the_advice_gives_one(base: Any, tmp_path: Path) -> None:
    folder = base("llama")
    experts = [
        make_adapter(folder, tmp_path / "a", target_modules=["q_proj", "down_proj"]),
        make_adapter(folder, tmp_path / "b", seed=2, target_modules=["q_proj"]),
    ]
    merge(experts, tmp_path / "exact")
    notes = json.loads((tmp_path / "exact/merge_manifest.json").read_text())["notes"]
    (note,) = (note for note in notes if "runtimes that read only r and lora_alpha" in note)
    assert "ranks from 4 to 8" in note
    assert "--adapter-rank-pattern uniform" in note
    rank = int(re.findall(r"all of them rank (\d+)", note)[0])

    merge(experts, tmp_path / "uniform", adapter_rank_pattern="uniform")
    assert "lora_alpha" not in str(json.loads((tmp_path / "uniform/merge_manifest.json").read_text())["notes"])
    config = json.loads((tmp_path / "uniform/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (rank, rank, {}, {})
    tensors = load_file(tmp_path / "uniform/adapter_model.safetensors")
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items()} == {rank}

    exact, uniform = (PeftModel.from_pretrained(load(folder), tmp_path / name).eval() for name in ("exact", "uniform"))
    check_logits(uniform, exact, load(folder))
    naive = load(folder)  # a runtime that reads one rank and one alpha
    with torch.no_grad():
        for name, up in tensors.items():
            if "lora_B" in name:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                delta = config["lora_alpha"] / config["r"] * up @ tensors[name.replace("lora_B", "lora_A")]
                naive.get_submodule(module).weight += delta
    check_logits(naive, exact, load(folder))

    merge(experts, tmp_path / "large", adapter_rank=100)  # no more zeros than one rank takes
    assert json.loads((tmp_path / "large/adapter_config.json").read_text())["r"] == rank


# What an earlier merge left in the folder


def test_an_adapter_and_a_model_never_lie_in_one_output_folder(base: Any, tmp_path: Path) -> None:
    folder, out = base("llama"), tmp_path / "out"
    adapter = make_adapter(folder, tmp_path / "a", target_modules=["q_proj"])
    peft_model = PeftModel.from_pretrained(load(folder), adapter).eval()
    for output in ("merged", "adapter", "merged"):
        merge([adapter, adapter], out, folder, adapter_output=output, overwrite=True)
        model, lora = {"config.json", "model.safetensors"}, {"adapter_config.json", "adapter_model.safetensors"}
        actual = {path.name for path in out.iterdir()} & (model | lora)
        assert actual == (model if output == "merged" else lora)
        check_logits(load(out), peft_model, load(folder))


def test_layers_that_transformers_parts_on_loading_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    """NomicBERT stores queries, keys and values in one tensor, which transformers parts into three."""
    model_class = getattr(transformers, "NomicBertForMaskedLM", None)
    if model_class is None:
        pytest.skip("this transformers does not have it")
    torch.manual_seed(0)
    config = transformers.NomicBertConfig(**{**TEXT, "num_key_value_heads": 2}, head_dim=8)
    model_class(config).save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        model_class.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.*transformers joins or parts other tensors") as refused:
        merge([tmp_path / "adapter"], tmp_path / "out", tmp_path / "base", adapter_output="merged")
    code = str(refused.value).split("do that once:")[1].split("and pass")[0]
    for written, own in {
        "ITS BASE MODEL": str(tmp_path / "base"),
        "THIS ADAPTER": str(tmp_path / "adapter"),
        '"folded"': f'"{tmp_path / "folded"}"',
        "AutoModelForCausalLM": "AutoModelForMaskedLM",
    }.items():
        code = code.replace(written, own)
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)
    merge([tmp_path / "folded", tmp_path / "base"], tmp_path / "out", method="linear")
    merged, base = (model_class.from_pretrained(tmp_path / name).state_dict() for name in ("out", "base"))
    wanted = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (wanted[name] + base[name]) / 2, rtol=0, atol=1e-6)
