"""Quantised models as inputs, against the library's own decompression in memory and formulas written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_frmerge.checkpoints.quantised.dequantise import dequantise
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.quantised import refuse_quantised
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.errors import CheckpointError
from hf_frmerge.extraction.extract_lora import ExtractOptions, extract_lora
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, tie_word_embeddings=False, dtype="bfloat16",
)  # fmt: skip
Tensors = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Makes of a weight what is stored in its place, by ending of the name, and the weight that this stands for."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 1000)


def fp8_blocks(size: tuple[int, int] = (128, 128)) -> Quantise:
    """DeepSeek's format, written out: a scale for every block, with which its codes are multiplied."""

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, cols = (-(-length // each) for length, each in zip(weight.shape, size))
        codes, scales = torch.zeros(weight.shape), torch.zeros(rows, cols)
        stands_for = torch.zeros(weight.shape)
        for i in range(rows):
            for j in range(cols):
                block = slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1])
                scales[i, j] = weight[block].float().abs().max() / 448
                codes[block] = (weight[block].float() / scales[i, j]).to(torch.float8_e4m3fn).float()
                stands_for[block] = codes[block] * scales[i, j]
        stored = {"weight": codes.to(torch.float8_e4m3fn), "weight_scale_inv": scales}
        return stored, stands_for.to(torch.bfloat16)

    return quantise


def scheme_of(preset: str) -> QuantizationScheme:
    scheme = QuantizationScheme(
        targets=["Linear"], **preset_name_to_scheme(preset, ["Linear"]).model_dump(exclude={"targets"})
    )
    if scheme.weights is not None and scheme.weights.group_size == 128:
        scheme.weights.group_size = 32  # several groups in a row of the small model
    return scheme


def by_the_library(preset: str) -> Quantise:
    """A format of compressed-tensors, and what the package makes of it in memory."""
    scheme = scheme_of(preset)
    weights = scheme.weights
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme))

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        state: Tensors = {"weight": weight}
        view = weight
        if weights.group_size:
            view = weight.unflatten(-1, (-1, weights.group_size))
        elif weights.block_structure:
            view = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2).flatten(2)
        if weights.strategy == "tensor":
            low, high = weight.aminmax()
        else:
            low, high = view.amin(-1), view.amax(-1)
            low, high = (low[:, None], high[:, None]) if weights.strategy == "channel" else (low, high)
        global_scale = generate_gparam(weight.amin(), weight.amax()) if weights.strategy == "tensor_group" else None
        scale, zero = calculate_qparams(low, high, weights, global_scale=global_scale)
        state |= {"weight_scale": scale} | ({} if weights.symmetric else {"weight_zero_point": zero})
        state |= {} if global_scale is None else {"weight_global_scale": global_scale}
        stored = compressor.compress(state, scheme)
        return stored, compressor.decompress(stored, scheme)["weight"].to(torch.bfloat16)

    return quantise


_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """AutoAWQ's format, written out: groups of 32 inputs, eight outputs to a word, in its own order."""
    groups = weight.float().T.unflatten(0, (-1, 32))  # (groups, 32, out)
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)

    def packed(numbers: torch.Tensor) -> torch.Tensor:
        words = numbers.to(torch.int64).unflatten(-1, (-1, 8))
        joined = sum(words[..., _AWQ_ORDER[place]] << (4 * place) for place in range(8))
        return ((joined + 2**31) % 2**32 - 2**31).to(torch.int32)

    stands_for = ((codes - zeros[:, None]) * scales.float()[:, None]).flatten(0, 1).T
    stored = {"qweight": packed(codes.flatten(0, 1)), "qzeros": packed(zeros), "scales": scales}
    return stored, stands_for.half().to(torch.bfloat16).contiguous()


def modelopt_nvfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """ModelOpt's format: that of the library, but for names and a scale that is its inverse."""
    stored, _ = by_the_library("NVFP4A16")(weight)
    inverse = (1 / stored["weight_global_scale"]).reshape([])
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    stands_for = compressor.decompress(stored | {"weight_global_scale": 1 / inverse}, scheme_of("NVFP4A16"))["weight"]
    return {
        "weight": stored["weight_packed"],
        "weight_scale": stored["weight_scale"],
        "weight_scale_2": inverse,
        "input_scale": torch.ones(()),
    }, stands_for.to(torch.bfloat16)


def ct_section(preset: str) -> dict[str, Any]:
    scheme = scheme_of(preset)
    scheme.format = infer_module_format(torch.nn.Linear, scheme).value
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format=scheme.format, quantization_status="compressed"
    )
    return json.loads(config.model_dump_json(exclude_none=True))


AWQ_SECTION = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8_SECTION = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
PRESETS = [
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "INT8",
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "NVFP4A16",
    "MXFP4A16",
    "MXFP6A16",
]
FORMATS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "fp8": (fp8_blocks(), FP8_SECTION),
    "fp8, other blocks": (fp8_blocks((64, 96)), FP8_SECTION | {"weight_block_size": [64, 96]}),
    "fp8 without a section": (fp8_blocks(), {}),
    "awq": (awq, AWQ_SECTION),
    "modelopt": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    **{preset: (by_the_library(preset), ct_section(preset)) for preset in PRESETS},
}


def save(folder: Path, seed: int, quantise: Quantise | None = None, section: dict[str, Any] | None = None) -> Tensors:
    """Save a model, with the weights of its layers quantised; return the weights that the folder stands for."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LLAMA).to(torch.bfloat16).save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    stored = dict(plain)
    for name in [name for name in plain if name.endswith("proj.weight") and quantise]:
        del stored[name]
        assert quantise is not None
        codes, plain[name] = quantise(plain[name])
        stored |= {f"{name.removesuffix('weight')}{ending}": tensor for ending, tensor in codes.items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    if section:
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": section}
        (folder / "config.json").write_text(json.dumps(config))
    return plain


def merge(experts: list[Path], out: Path, base: Path | None = None, **options: Any) -> Any:
    args = MergingArguments(str(out), **options)
    plan = build_plan(list(map(str, experts)), args, None, str(base) if base else None)
    run_merge(plan, StepObserver(), Processes())
    return plan


@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_models_are_merged_as_what_they_stand_for(tmp_path: Path, kind: str) -> None:
    quantise, section = FORMATS[kind]
    first, second = save(tmp_path / "a", 1, quantise, section), save(tmp_path / "b", 2)
    out = tmp_path / "out"
    plan = merge([tmp_path / "a", tmp_path / "b"], out, method="linear")
    merged, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = merged.state_dict()
    assert state.keys() == first.keys()
    for name, tensor in first.items():
        wanted = ((tensor.double() + second[name].double()) / 2).to(torch.bfloat16)
        assert torch.equal(state[name], wanted), name
    config = json.loads((out / "config.json").read_text())
    assert not {"quantization_config", "quantization"} & config.keys()
    (note,) = [note for note in plan.notes if "is quantised" in note]
    assert "7 weights" in note and "The output is not quantised" in note
    stored = load_file(tmp_path / "a/model.safetensors")
    account = json.loads((out / "merge_manifest.json").read_text())["report"]["accounts"][0]
    not_needed = sum(name.endswith("input_scale") for name in stored)
    assert account["n_tensors"] == len(stored) == account["n_merged"] + not_needed
    assert sum(account["unused"].values()) == not_needed
    assert verify(str(out)).ok and reproduce(str(out)).identical


def test_deltas_to_a_quantised_base(tmp_path: Path) -> None:
    base = save(tmp_path / "base", 0, *FORMATS["fp8"])
    models = [save(tmp_path / name, seed) for seed, name in ((1, "a"), (2, "b"))]
    options = {"method": "task_arithmetic", "space": "deltas", "scale": 0.5, "dtype": "float32"}
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tmp_path / "base", **options)
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, origin in base.items():
        deltas = [model[name].double() - origin.double() for model in models]
        torch.testing.assert_close(merged[name], (origin.double() + 0.5 * sum(deltas)).float())


def test_an_adapter_is_extracted_from_quantised_models(tmp_path: Path) -> None:
    base = save(tmp_path / "base", 0, *FORMATS["fp8"])
    tuned = save(tmp_path / "tuned", 1, *FORMATS["fp8"])
    opened = [open_checkpoint(Source(name, "full", str(tmp_path / name))) for name in ("tuned", "base")]
    with opened[0], opened[1]:
        extracted = extract_lora(*opened, tmp_path / "lora", ExtractOptions(rank=128, target_modules=["q_proj"]))
    name = "model.layers.0.self_attn.q_proj"
    factors = load_file(tmp_path / "lora/adapter_model.safetensors")
    up, down = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "BA")
    delta = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
    assert (up @ down - delta).norm() < 0.01 * delta.norm() and extracted.modules


def test_a_section_over_plain_weights_is_passed_over(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 1, None, FP8_SECTION), save(tmp_path / "b", 2)
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="linear")
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in first.items():
        assert torch.equal(merged[name], ((tensor.double() + second[name].double()) / 2).to(torch.bfloat16))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert any("its weights are plain numbers" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("quantise", "section", "sentence"),
    [
        (awq, AWQ_SECTION | {"version": "gemv"}, "in a way that compressed-tensors does not convert.*gemv"),
        (awq, {"quant_method": "gptq", "bits": 4}, r"quantised \(GPTQ\), but codes .* do not fit together"),
        (by_the_library("W4A16"), {}, r"quantised \(compressed-tensors, by its tensors"),
        (fp8_blocks((64, 64)), {}, "could not be dequantised from .*not those of blocks of 128 by 128"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, quantise: Quantise, section: dict[str, Any], sentence: str
) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path / name, seed, quantise, section)
    with pytest.raises(CheckpointError, match=sentence):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_codes_beside_those_of_a_format_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", 1, *FORMATS["fp8"])
    stored = load_file(tmp_path / "a/model.safetensors")
    del stored["model.layers.0.self_attn.q_proj.weight_scale_inv"]
    save_file(stored, tmp_path / "a/model.safetensors")
    with open_checkpoint(Source("a", "full", str(tmp_path / "a"))) as checkpoint:
        dequantise(checkpoint)
        with pytest.raises(CheckpointError, match=r"q_proj\.weight \(F8_E4M3\)"):
            refuse_quantised(checkpoint)


@pytest.mark.parametrize("dim", [2, 3])
def test_stacks_of_fp8_experts(tmp_path: Path, dim: int) -> None:
    """A checkpoint of one tensor: a matrix, or a stack of them with the scales of each."""
    torch.manual_seed(0)
    pairs = [fp8_blocks()(torch.randn(130, 200)) for _ in range(3)]
    names = ("experts.up_proj", "experts.up_proj_scale_inv") if dim == 3 else ("up.weight", "up.weight_scale_inv")
    stored = [torch.stack([pair[0][n] for pair in pairs]) if dim == 3 else pairs[0][0][n] for n in pairs[0][0]]
    (tmp_path / "a").mkdir()
    save_file(dict(zip(names, stored)), tmp_path / "a/model.safetensors")
    (tmp_path / "a/config.json").write_text("{}")
    with open_checkpoint(Source("a", "full", str(tmp_path / "a"))) as checkpoint:
        dequantise(checkpoint)
        (info,) = checkpoint.tensors.values()
        wanted = torch.stack([pair[1] for pair in pairs]) if dim == 3 else pairs[0][1]
        assert (info.name, info.dtype, info.shape) == (names[0], "BF16", tuple(wanted.shape))
        assert checkpoint.read(info.name).tobytes() == wanted.contiguous().view(torch.uint8).numpy().tobytes()
        assert checkpoint.read(info.name, 100, 1000).tobytes() == checkpoint.read(info.name).tobytes()[100:1000]
