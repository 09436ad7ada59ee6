"""What bitsandbytes and MLX store, as inputs, against loops over single codes and, where installed, bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click_runner import click_runner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_frmerge.checkpoints.quantised.dequantise import dequantise
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.floats import widen
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

# The inner size of the MLP is no multiple of bitsandbytes' blocks: they go on from row to row.
LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=16)
Tensors = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""A matrix -> what is stored for it by the endings of names, and what that stands for, in float64."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 1000)


def four_bit(kind: str, *, nested: bool = False, storage: torch.dtype = torch.uint8) -> Quantise:
    block, nested_block = 64, 256

    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        generator = torch.Generator().manual_seed(weight.numel())
        numbers = torch.rand(16, generator=generator) * 2 - 1  # the map is in the file: any will do
        codes = torch.randint(0, 16, (weight.numel(),), generator=generator).tolist()
        scales = torch.rand(-(-len(codes) // block), generator=generator) / 10
        octets = [16 * codes[i] + codes[i + 1] for i in range(0, len(codes), 2)]
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float16"}
        state["shape"] = list(weight.shape)
        tensors = {"weight": torch.tensor(octets, dtype=torch.uint8).view(storage)[:, None]}
        tensors["weight.quant_map"] = numbers
        exact = scales.double()
        if nested:
            outer, offset = torch.rand(256, generator=generator), 0.25
            places = torch.randint(0, 256, scales.shape, generator=generator)
            wide = torch.rand(-(-len(scales) // nested_block), generator=generator)
            exact = torch.stack([outer[p].double() * wide[i // nested_block] + offset for i, p in enumerate(places)])
            scales = places.to(torch.uint8)
            tensors |= {"weight.nested_absmax": wide, "weight.nested_quant_map": outer}
            state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": offset}
        tensors["weight.absmax"] = scales
        stored = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = stored
        stands_for = [numbers[code].double() * exact[i // block] for i, code in enumerate(codes)]
        return tensors, torch.stack(stands_for).reshape(weight.shape)

    return quantise


def eight_bit(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scales = weight.float().abs().amax(dim=1)
    codes = (weight.float() / scales[:, None] * 127).round().to(torch.int8)
    stands_for = torch.stack([row.double() * scale.double() / 127 for row, scale in zip(codes, scales)])
    return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}, stands_for


def mlx(bits: int, size: int = 32) -> Quantise:
    def quantise(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        n_out, n_in = weight.shape
        generator = torch.Generator().manual_seed(n_in)
        codes = torch.randint(0, 2**bits, (n_out, n_in), generator=generator)
        scales, biases = (torch.rand(2, n_out, n_in // size, generator=generator) / 10).half()
        words = []
        for row in codes.tolist():
            string = sum(code << (bits * place) for place, code in enumerate(row))
            words.append([(string >> (32 * place)) % 2**32 for place in range(n_in * bits // 32)])
        stands_for = torch.zeros(n_out, n_in, dtype=torch.float64)
        for o in range(n_out):
            for i in range(n_in):
                stands_for[o, i] = scales[o, i // size].double() * codes[o, i] + biases[o, i // size].double()
        packed = torch.tensor(words, dtype=torch.int64).to(torch.uint32)
        return {"weight": packed, "scales": scales, "biases": biases}, stands_for

    return quantise


BITSANDBYTES = {"quantization_config": {"quant_method": "bitsandbytes"}}


def of_mlx(bits: int, **layers: Any) -> dict[str, Any]:
    return {"quantization": {"group_size": 32, "bits": bits, **layers}}


FORMATS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "nf4": (four_bit("nf4"), BITSANDBYTES),
    "nf4 twice, stored as bf16": (four_bit("nf4", nested=True, storage=torch.bfloat16), BITSANDBYTES),
    "fp4 twice": (four_bit("fp4", nested=True), BITSANDBYTES),
    "nf4 without a section": (four_bit("nf4"), {}),
    "int8": (eight_bit, BITSANDBYTES),
    **{f"mlx {bits}": (mlx(bits), of_mlx(bits)) for bits in (2, 3, 4, 5, 6, 8)},
}


def save(
    folder: Path, quantise: Quantise | None = None, section: dict[str, Any] | None = None, seed: int = 1
) -> Tensors:
    """Save a model, its layers quantised; return the weights it stands for, in float64."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LLAMA).half().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    stands_for = {name: tensor.double() for name, tensor in stored.items()}
    for name in [name for name in stored if quantise is not None and name.endswith("proj.weight")]:
        assert quantise is not None
        codes, stands_for[name] = quantise(stored.pop(name))
        stored |= {f"{name.removesuffix('weight')}{ending}": tensor for ending, tensor in codes.items()}
    save_file(stored, folder / "model.safetensors")
    change_config(folder, **(section or {}))
    return stands_for


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change(folder: Path, edit: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("kind", FORMATS)
def test_models_are_merged_as_what_they_stand_for(tmp_path: Path, kind: str) -> None:
    wanted = save(tmp_path / "a", *FORMATS[kind])
    plain = save(tmp_path / "b", seed=2)
    args = MergingArguments(str(tmp_path / "out"), method="linear", dtype="float32")
    plan = build_plan([str(tmp_path / "a"), str(tmp_path / "b")], args)
    run_merge(plan, StepObserver(), Processes())
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in merged.state_dict().items():
        # Weights are rounded to the model's own dtype, half a unit in the last place of 11 bits, as runtimes do.
        mean = (wanted[name] + plain[name]) / 2
        assert torch.allclose(tensor.double(), mean, rtol=0, atol=2**-12 * float(wanted[name].abs().max())), name
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not config.keys() & {"quantization", "quantization_config"}
    assert any("is quantised (" in note and ": 7 weights" in note for note in plan.notes)
    assert verify(str(tmp_path / "out")).ok and reproduce(str(tmp_path / "out")).identical


def test_layers_of_mlx_may_have_sizes_of_their_own(tmp_path: Path) -> None:
    wanted = save(tmp_path / "a", mlx(4), of_mlx(4, **{"model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 8}}))
    name = "model.layers.0.mlp.up_proj"
    codes, stands_for = mlx(8, 64)(wanted[f"{name}.weight"])
    change(tmp_path / "a", lambda tensors: tensors.update({f"{name}.{part}": t for part, t in codes.items()}))
    wanted[f"{name}.weight"] = stands_for
    read = dequantised(tmp_path / "a")
    for each in (name, "model.layers.0.mlp.down_proj"):
        assert torch.equal(read[f"{each}.weight"], wanted[f"{each}.weight"].half().double())


def dequantised(folder: Path) -> Tensors:
    with open_checkpoint(Source("m", "full", str(folder))) as checkpoint:
        dequantise(checkpoint)
        return {
            name: torch.from_numpy(widen(checkpoint.read(name), info.dtype).copy()).reshape(info.shape).double()
            for name, info in checkpoint.tensors.items()
        }


@pytest.mark.parametrize("quantise", [four_bit("nf4"), eight_bit])
def test_transposed_layers_are_turned_back(tmp_path: Path, quantise: Quantise) -> None:
    GPT2LMHeadModel(GPT2).half().save_pretrained(tmp_path / "m")
    tensors, wanted = load_file(tmp_path / "m/model.safetensors"), dict[str, torch.Tensor]()
    for name in [name for name in tensors if ".c_" in name and name.endswith("weight")]:
        codes, turned = quantise(tensors.pop(name).T.contiguous())  # as transformers does first
        wanted[name] = turned.T
        tensors |= {f"{name.removesuffix('weight')}{ending}": tensor for ending, tensor in codes.items()}
    save_file(tensors, tmp_path / "m/model.safetensors")
    change_config(tmp_path / "m", **BITSANDBYTES)
    read = dequantised(tmp_path / "m")
    assert len(wanted) == 4
    # Half a unit in the last place of 11 bits, or of the smallest numbers, and the rounding of float32 before.
    close = {"rtol": 2**-11 + 2**-22, "atol": 2**-25 + 2**-30}
    assert all(torch.allclose(read[name], tensor, **close) for name, tensor in wanted.items())


UP = "model.layers.0.mlp.up_proj"


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors.pop(name)[:-1].clone()})


def state(**values: Any) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        name = f"{UP}.weight.quant_state.bitsandbytes__nf4"
        content = json.loads(bytes(tensors[name].tolist())) | values
        tensors[name] = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)

    return edit


def garbage(tensors: Tensors) -> None:
    tensors[f"{UP}.weight.quant_state.bitsandbytes__nf4"] = torch.full((9,), 200, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "edit", "says"),
    [
        ("nf4", drop(f"{UP}.weight"), r"up_proj.weight of shape \[96, 64\] needs 3072 of codes, not 3071"),
        ("nf4", drop(f"{UP}.weight.absmax"), "needs 96 of absmax, not 95"),
        ("nf4", drop(f"{UP}.weight.quant_map"), "needs 16 of quant_map, not 15"),
        ("fp4 twice", drop(f"{UP}.weight.nested_quant_map"), "needs 256 of nested_quant_map, not 255"),
        ("fp4 twice", lambda tensors: tensors.pop(f"{UP}.weight.nested_absmax"), "not all that .* is made of"),
        ("nf4", lambda tensors: tensors.pop(f"{UP}.weight.absmax"), "not all that .* is made of"),
        ("nf4", state(shape=[96, -64]), "are not all sizes"),
        ("nf4", state(shape=[64, 48], blocksize=0), "are not all sizes"),
        ("nf4", state(shape="large"), "are not all sizes"),
        ("nf4", state(nested_offset="x"), "nested_offset is 'x'"),
        ("nf4", garbage, "cannot be read: byte 0 is not UTF-8"),
        ("int8", drop(f"{UP}.SCB"), "has 95 scales for"),
        ("int8", lambda tensors: tensors[f"{UP}.weight_format"].fill_(2), "codes do not lie in rows"),
        ("mlx 4", drop(f"{UP}.scales"), r"do not fit groups of 32 with 4 bits"),
        (
            "mlx 4",
            lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"][:, :-1].clone()}),
            "do not fit",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, kind: str, edit: Callable[[Tensors], None], says: str
) -> None:
    save(tmp_path / "a", *FORMATS[kind])
    change(tmp_path / "a", edit)
    with pytest.raises(CheckpointError, match=says) as caught:
        build_plan([str(tmp_path / "a")] * 2, MergingArguments(str(tmp_path / "out")))
    assert "is quantised (" in str(caught.value) and "Merge the unquantised checkpoints" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (of_mlx(4, mode="mxfp4"), "its mode is 'mxfp4'"),
        (of_mlx(7), "gives .* bits 7"),
        (of_mlx(4, **{UP: {"mode": "nvfp4"}}), "mode 'nvfp4'"),
        ({**of_mlx(4), "model_type": "qwen3_next"}, "weights of 'qwen3_next' in another form than transformers"),
        ({}, "by its tensors .*, though its config.json does not say how"),
    ],
)
def test_mlx_that_is_not_known_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    save(tmp_path / "a", mlx(4), config)
    with pytest.raises(CheckpointError, match=says):
        build_plan([str(tmp_path / "a")] * 2, MergingArguments(str(tmp_path / "out")))


@pytest.mark.parametrize("kind", ["mlx", "mlx, as its newer versions write it", "nf4 without a section"])
def test_evaluation_of_what_transformers_does_not_read_is_refused(tmp_path: Path, kind: str) -> None:
    sections = of_mlx(4)
    newer = {**sections, "quantization_config": sections["quantization"]}
    known = {"mlx": (mlx(4), sections), "mlx, as its newer versions write it": (mlx(4), newer)}
    save(tmp_path / "a", *{**FORMATS, **known}[kind])
    models = ModelSet({"a": str(tmp_path / "a")}, {"a": "expert"})
    rows = {"text": [{"input_ids": list(range(40))}]}
    loaded: list[str] = []
    run = RunSettings(cache_dir=tmp_path / "cache", on_model=loaded.append)
    with pytest.raises(ArgumentError, match="is quantised, and transformers cannot load it here") as caught:
        evaluate_suite(models, rows, SuiteOptions(), run)
    assert loaded == []
    advice = str(caught.value).split("`frmerge ")[1].split("`")[0].replace("MODEL", str(tmp_path / "a"))
    assert click_runner().invoke(main, advice.replace("PLAIN", str(tmp_path / "plain")).split()).exit_code == 0
    plain = ModelSet({"a": str(tmp_path / "plain")}, {"a": "expert"})
    assert evaluate_suite(plain, rows, SuiteOptions(), run).scores


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ],
)
def test_what_bitsandbytes_writes_is_read_as_bitsandbytes_reads_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    # Rows of whole blocks: of others, its own kernel for CPUs takes wrong scales (0.50).
    config = LlamaConfig(**{**LLAMA.to_dict(), "intermediate_size": 128})
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "plain")
    options = {"quantization_config": BitsAndBytesConfig(**settings), "dtype": torch.float16}
    LlamaForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "m")
    wanted = LlamaForCausalLM.from_pretrained(tmp_path / "m").dequantize().state_dict()
    read = dequantised(tmp_path / "m")
    assert all(torch.equal(read[name], tensor.double()) for name, tensor in wanted.items())
