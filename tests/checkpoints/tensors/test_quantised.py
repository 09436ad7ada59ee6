"""Quantised checkpoints: told by their tensors too, refused, and the ways out that are named lead out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from hf_frmerge.checkpoints.alignment.align import align
from hf_frmerge.checkpoints.tensors.quantised import refuse_quantised
from hf_frmerge.errors import CheckpointError

U8, I8, I32, U32, I64 = torch.uint8, torch.int8, torch.int32, torch.uint32, torch.int64
FP8 = torch.float8_e4m3fn


def codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(0, 100, shape, dtype=torch.int64).to(dtype)


# What each library stores for a linear layer `x` of 32 x 64.
FORMATS = {
    "GPTQ": {"x.qweight": (I32, 8, 32), "x.qzeros": (I32, 1, 4), "x.g_idx": (I32, 64)},
    "AWQ": {"x.qweight": (I32, 64, 4), "x.qzeros": (I32, 1, 4)},
    "8 bit": {"x.weight": (I8, 32, 64), "x.SCB": (torch.float32, 32), "x.weight_format": (U8,)},
    "older": {"x.weight": (I8, 32, 64), "x.SCB": (torch.float32, 32)},
    "4 bit": {
        "x.weight": (U8, 1024, 1),
        "x.weight.absmax": (U8, 32),
        "x.weight.quant_state.bitsandbytes__nf4": (U8, 9),
    },
    "stripped": {"x.weight": (U8, 1024, 1), "x.weight.absmax": (torch.float32, 32)},
    "MLX": {"x.weight": (U32, 32, 8), "x.scales": (torch.float16, 32, 2), "x.biases": (torch.float16, 32, 2)},
    "compressed-tensors": {"x.weight_packed": (I32, 32, 8), "x.weight_shape": (I64, 2)},
    "FP8": {"x.weight": (FP8, 32, 64), "x.weight_scale_inv": (torch.float32, 1, 1)},
    "INT8": {"x.weight": (I8, 32, 64), "x.weight_scale": (torch.bfloat16, 32, 1)},
    "MXFP4": {"x.gate_up_proj_blocks": (U8, 32, 2, 16), "x.gate_up_proj_scales": (U8, 32, 2)},
}
NAMES = {"8 bit": "bitsandbytes", "older": "bitsandbytes", "4 bit": "bitsandbytes", "stripped": "bitsandbytes"}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_told_by_their_tensors(tmp_path, save_model, open_folder_as, kind):
    save_model(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    for name, (dtype, *shape) in FORMATS[kind].items():
        tensors[f"model.layers.0.mlp.{name}"] = codes(dtype, *shape)
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        refuse_quantised(open_folder_as(tmp_path / "m", "m"))
    assert str(caught.value).startswith("'m' is quantised (")
    assert NAMES.get(kind, kind) in str(caught.value)
    assert "model.layers.0.mlp.x" in str(caught.value)
    assert "Merge the unquantised checkpoints" in str(caught.value)


def test_mlx_says_it_in_a_key_of_its_own(tmp_path, save_model, open_folder_as):
    save_model(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"quantization": {"group_size": 64, "bits": 4}}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'m' is quantised \(MLX\)"):
        refuse_quantised(open_folder_as(tmp_path / "m", "m"))


# Matrices of integers that are codes of a format nobody knows


def pair_with(folder: Path, save_model, first: torch.Tensor, second: torch.Tensor) -> list[Path]:
    for name, tensor in (("a", first), ("b", second)):
        save_model(folder / name)
        tensors = load_file(folder / name / "model.safetensors") | {"model.table": tensor}
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
    return [folder / "a", folder / "b"]


@pytest.mark.parametrize("dtype", [U8, I8, torch.int16, I32, I64])
def test_matrices_of_integers_that_differ_are_refused(tmp_path, save_model, open_folder_as, dtype):
    table = codes(dtype, 8, 9)
    other = table.clone()
    other[-1, -1] += 1
    a, b = (open_folder_as(path, path.name) for path in pair_with(tmp_path, save_model, table, other))
    with pytest.raises(CheckpointError, match=r"model\.table is a matrix of integers .* in 'b' than in 'a'"):
        align([a, b])


def test_large_matrices_are_compared_to_the_end(tmp_path, save_model, open_folder_as):
    table = torch.zeros(5, 1 << 22, dtype=U8)
    other = table.clone()
    other[-1, -1] = 1
    folders = pair_with(tmp_path, save_model, table, other)
    with pytest.raises(CheckpointError, match="matrix of integers"):
        align([open_folder_as(folder) for folder in folders])


def test_equal_matrices_and_masks_stay_fine(tmp_path, save_model, open_folder_as):
    equal = pair_with(tmp_path / "equal", save_model, codes(I64, 8, 9), codes(I64, 8, 9) * 0)
    save_file(load_file(equal[0] / "model.safetensors"), equal[1] / "model.safetensors", {"format": "pt"})
    assert align([open_folder_as(folder) for folder in equal]).notes == []
    mask = torch.ones(8, 8).bool()
    masks = [open_folder_as(folder) for folder in pair_with(tmp_path / "masks", save_model, mask, mask.tril())]
    assert "it is copied from" in align(masks).notes[0]
    older = pair_with(tmp_path / "older", save_model, mask, mask.to(U8))
    assert "it is copied from" in align([open_folder_as(folder) for folder in older]).notes[0]
    assert "it is copied from" in align([open_folder_as(folder) for folder in older[::-1]]).notes[0]


# The ways out


def code_in(message: str) -> list[str]:
    return message.split("`")[1::2]


def test_the_way_out_of_fp8_gives_the_weights_back(tmp_path, save_model, open_folder_as):
    save_model(tmp_path / "full", hidden_size=128, intermediate_size=128)
    weights = load_file(tmp_path / "full/model.safetensors")
    stored = dict(weights)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].float().abs().max() / 448
        stored[name] = (weights[name].float() / scale).to(FP8)
        stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
    (tmp_path / "fp8").mkdir()
    save_file(stored, tmp_path / "fp8/model.safetensors", {"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = json.loads((tmp_path / "full/config.json").read_text()) | {"quantization_config": method}
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        refuse_quantised(open_folder_as(tmp_path / "fp8"))
    load, save = code_in(str(caught.value))
    assert load == "from_pretrained(..., quantization_config=FineGrainedFP8Config(dequantize=True))"
    assert save == "model.save_pretrained(..., save_original_format=False)"
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    model.save_pretrained(tmp_path / "back", save_original_format=False)
    back = open_folder_as(tmp_path / "back")
    assert len(align([open_folder_as(tmp_path / "full"), back]).tensors) == len(weights)
    for name, tensor in load_file(tmp_path / "back/model.safetensors").items():
        # Three bits of mantissa are left of a weight, and as many of the smallest normal number: 2^-6 / 448.
        torch.testing.assert_close(tensor.float(), weights[name].float(), rtol=2**-4, atol=2**-9 / 448)


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_the_way_out_of_bitsandbytes_gives_the_weights_back(tmp_path, save_model, open_folder_as, options):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    save_model(tmp_path / "full", hidden_size=128, intermediate_size=128, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=BitsAndBytesConfig(**options))
    model.save_pretrained(tmp_path / "coded")
    with pytest.raises(CheckpointError) as caught:
        refuse_quantised(open_folder_as(tmp_path / "coded"))
    assert code_in(str(caught.value)) == [
        "from_pretrained",
        "model.dequantize()",
        "model.save_pretrained(..., save_original_format=False)",
    ]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "coded").dequantize()
    model.save_pretrained(tmp_path / "back", save_original_format=False)
    align([open_folder_as(tmp_path / "full"), open_folder_as(tmp_path / "back")])
    weights = load_file(tmp_path / "full/model.safetensors")
    for name, tensor in load_file(tmp_path / "back/model.safetensors").items():
        assert (tensor.float() - weights[name]).norm() <= 0.15 * weights[name].norm()
