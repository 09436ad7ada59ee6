"""GPTQ and MXFP4 as inputs, against loops over single codes and transformers' own dequantised model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click_runner import click_runner
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
)

from hf_frmerge.checkpoints.quantised.dequantise import dequantise
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.suite.suite import evaluate_suite
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
Tensors = dict[str, torch.Tensor]
GROUP = 32


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 1000)


def gptq(weight: torch.Tensor, bits: int, version: str, *, act_order: bool) -> tuple[Tensors, torch.Tensor]:
    """What GPTQ stores for a weight, code by code, and the weight that this stands for."""
    n_out, n_in = weight.shape
    per_word, n_groups = 32 // bits, n_in // GROUP
    generator = torch.Generator().manual_seed(n_in)
    order = torch.arange(n_in) // GROUP
    if act_order:
        order = order[torch.randperm(n_in, generator=generator)]
    scales = (torch.rand(n_groups, n_out, generator=generator) / 50 + 0.01).half()
    zeros = torch.randint(0, 2**bits, (n_groups, n_out), generator=generator)
    codes = torch.randint(0, 2**bits, (n_in, n_out), generator=generator)
    qweight, qzeros = [[0] * n_out for _ in range(n_in // per_word)], [[0] * (n_out // per_word) for _ in scales]
    stands_for = torch.zeros(n_out, n_in, dtype=torch.float64)
    for o in range(n_out):
        for i in range(n_in):
            qweight[i // per_word][o] |= int(codes[i, o]) << (bits * (i % per_word))
            stands_for[o, i] = (codes[i, o] - zeros[order[i], o]) * scales[order[i], o].double()
        for g in range(n_groups):
            stored = int(zeros[g, o]) - (1 if version == "gptq" else 0)  # -1 wraps round to the highest code
            qzeros[g][o // per_word] |= (stored % 2**bits) << (bits * (o % per_word))

    def words(rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor([[(word + 2**31) % 2**32 - 2**31 for word in row] for row in rows], dtype=torch.int32)

    tensors = {"qweight": words(qweight), "qzeros": words(qzeros), "scales": scales, "g_idx": order.int()}
    if not act_order:
        del tensors["g_idx"]
    return tensors, stands_for


def save_gptq(
    folder: Path, bits: int = 4, version: str = "gptq", *, act_order: bool = False, seed: int = 1
) -> Tensors:
    """Save a model with its layers quantised; return the weights it stands for, in float64."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LLAMA).half().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    stands_for = {name: tensor.double() for name, tensor in stored.items()}
    for name in [name for name in stored if name.endswith("proj.weight")]:
        codes, stands_for[name] = gptq(stored.pop(name), bits, version, act_order=act_order)
        stored |= {f"{name.removesuffix('weight')}{ending}": tensor for ending, tensor in codes.items()}
    save_file(stored, folder / "model.safetensors")
    section = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": act_order}
    section |= {} if version == "gptq" else {"checkpoint_format": version}
    change_config(folder, quantization_config=section)
    return stands_for


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def merge(experts: list[Path], out: Path, **options: Any) -> Any:
    plan = build_plan(list(map(str, experts)), MergingArguments(str(out), **options))
    run_merge(plan, StepObserver(), Processes())
    return plan


@pytest.mark.parametrize(
    ("bits", "version", "act_order"),
    [(4, "gptq", False), (4, "gptq", True), (8, "gptq", False), (2, "gptq_v2", True), (4, "gptq_v2", False)],
)
def test_gptq(tmp_path: Path, bits: int, version: str, act_order: bool) -> None:
    stands_for = save_gptq(tmp_path / "a", bits, version, act_order=act_order)
    torch.manual_seed(2)
    LlamaForCausalLM(LLAMA).half().save_pretrained(tmp_path / "b")
    plain = load_file(tmp_path / "b/model.safetensors")
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="linear", dtype="float32")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in merged.state_dict().items():
        # Weights are rounded to the model's own dtype, as runtimes do.
        wanted = (stands_for[name].half().double() + plain[name].double()) / 2
        assert torch.equal(tensor, wanted.float()), name
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert any("is quantised (GPTQ): 7 weights" in note for note in plan.notes)
    assert verify(str(tmp_path / "out")).ok and reproduce(str(tmp_path / "out")).identical


def test_gptq_of_transposed_layers_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.attn.c_proj"  # square: nothing but the class shows which way it lies
    codes, _ = gptq(stored.pop(f"{name}.weight"), 4, "gptq", act_order=False)
    save_file(
        stored | {f"{name}.{ending}": tensor for ending, tensor in codes.items()}, tmp_path / "model.safetensors"
    )
    change_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=rf"its class has {name}\.weight transposed.*Merge the unquantised"):
        dequantise(open_checkpoint(Source("m", "full", str(tmp_path))))


def cut(tensors: Tensors, ending: str) -> None:
    name = next(name for name in tensors if name.endswith(ending))
    tensors[name] = tensors[name][:, :3].contiguous()


@pytest.mark.parametrize(
    ("changes", "ending", "sentence"),
    [
        ({"checkpoint_format": "marlin"}, "", "its checkpoint_format is 'marlin'"),
        ({"bits": 8}, "", "has codes of 4 bits, and its config says 8"),
        ({}, "k_proj.qzeros", r"its codes are not of 2, 4 or 8 bits \(3 words of zeros for 32 outputs\)"),
        ({}, "k_proj.scales", "do not fit together"),
    ],
)
def test_gptq_that_is_not_known_is_refused(
    tmp_path: Path, changes: dict[str, Any], ending: str, sentence: str
) -> None:
    save_gptq(tmp_path)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    change_config(tmp_path, quantization_config=section | changes)
    tensors = load_file(tmp_path / "model.safetensors")
    if ending:
        cut(tensors, ending)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"(?i)'m' is quantised \(gptq\), but .*{sentence}.*Merge the unquantised"
    ):
        dequantise(open_checkpoint(Source("m", "full", str(tmp_path))))


FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def save_gpt_oss(folder: Path) -> None:
    config = GptOssConfig(
        vocab_size=40, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False,
        layer_types=["full_attention"], pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, n_in, n_out = stored.pop(name).shape
        stored[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, n_out, n_in // 32, 16), generator=generator, dtype=torch.uint8
        )
        stored[f"{name}_scales"] = torch.randint(
            115, 130, (experts, n_out, n_in // 32), generator=generator, dtype=torch.uint8
        )
    save_file(stored, folder / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    save_gpt_oss(tmp_path / "a")
    wanted = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    with open_checkpoint(Source("a", "full", str(tmp_path / "a"))) as checkpoint:
        (note,) = dequantise(checkpoint)
        assert "MXFP4" in note and "2 weights" in note
        assert checkpoint.tensors.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert checkpoint.tensors[name].shape == tuple(tensor.shape)
            # The lowest version leaves what is not quantised in float32, as exact as in bfloat16.
            rounded = tensor.to(torch.bfloat16).contiguous()
            assert torch.equal(rounded.to(tensor.dtype), tensor), name
            assert checkpoint.read(name).tobytes() == rounded.view(torch.uint8).numpy().tobytes(), name
    stored = load_file(tmp_path / "a/model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    block, scale = stored[f"{name}_blocks"][1, 7, 0], int(stored[f"{name}_scales"][1, 7, 0])
    for place in range(32):
        code = int(block[place // 2]) >> 4 * (place % 2) & 15
        number = FP4[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (scale - 127)
        assert float(wanted[name][1, place, 7]) == number
    plan = merge([tmp_path / "a", tmp_path / "a"], tmp_path / "out", method="linear")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())
    assert plan.layout is not None and verify(str(tmp_path / "out")).ok


def test_streamed_from_the_hub(tmp_path: Path, hub: HubServer) -> None:
    for seed, name in enumerate(("a", "b")):
        save_gptq(tmp_path / name, seed=seed)
        hub.add_repo(f"lab/{name}", {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "local")
    plan = build_plan(["lab/a", "lab/b"], MergingArguments(str(tmp_path / "out"), stream_from_hub=True))
    assert all(model.source.path.startswith("hub://") for model in plan.models)
    run_merge(plan, StepObserver(), Processes())
    expected, actual = (load_file(tmp_path / folder / "model.safetensors") for folder in ("local", "out"))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="transformers can load them")
def test_evaluation_of_what_transformers_cannot_load_is_refused(tmp_path: Path) -> None:
    save_gptq(tmp_path / "a")
    models = ModelSet({"a": str(tmp_path / "a")}, {"a": "expert"})
    rows = {"text": [{"input_ids": list(range(40))}]}
    loaded: list[str] = []
    run = RunSettings(cache_dir=tmp_path / "cache", on_model=loaded.append)
    with pytest.raises(ArgumentError, match="is quantised, and transformers cannot load it here") as caught:
        evaluate_suite(models, rows, SuiteOptions(), run)
    assert loaded == []
    advice = str(caught.value).split("`frmerge ")[1].split("`")[0].replace("MODEL", str(tmp_path / "a"))
    command = advice.replace("PLAIN", str(tmp_path / "plain"))
    assert click_runner().invoke(main, command.split()).exit_code == 0
    plain = ModelSet({"a": str(tmp_path / "plain")}, {"a": "expert"})
    assert evaluate_suite(plain, rows, SuiteOptions(), run).scores
