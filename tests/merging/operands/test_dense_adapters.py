"""Adapters merged into full models, alone and beside full checkpoints, against PEFT's own merged weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import merged_reference
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_frmerge.errors import NonFiniteError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.methods.spectral.decision import RULES, memory_bytes
from hf_frmerge.methods.spectral.inputs import Experts, SpectralOptions
from hf_frmerge.methods.table import METHODS
from hf_frmerge.provenance.verify import verify

LLAMA = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4)
MODELS = {"llama": (LlamaForCausalLM, LLAMA), "gpt2": (GPT2LMHeadModel, GPT2)}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("bases")
    for name, (model_class, config) in MODELS.items():
        model_class(config).save_pretrained(root / name)
    return lambda name: root / name


def make_adapter(base: Path, folder: Path, seed: int, **config: Any) -> str:
    model = get_peft_model(MODELS[base.name][0].from_pretrained(base), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data = parameter.data * (0.5 + torch.rand(parameter.shape, generator=generator))
        elif "modules_to_save" in name:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return str(folder)


def effective(base: Path, adapter: str) -> dict[str, torch.Tensor]:
    """Weights PEFT computes with, in float64, by checkpoint name."""
    model = PeftModel.from_pretrained(
        MODELS[base.name][0].from_pretrained(base, dtype=torch.float64), adapter
    ).double()
    merged = model.merge_and_unload().state_dict()
    stored = load_file(base / "model.safetensors")
    return {name: merged[name if name in merged else f"transformer.{name}"] for name in stored}


def run(experts: list[str], out: Path, base: Path, weights: list[float] | None = None, **options: Any) -> dict:
    args = MergingArguments(output_dir=str(out), adapter_output="merged", **options)
    run_merge(build_plan(experts, args, weights, str(base)), StepObserver(), Processes())
    return load_file(out / "model.safetensors")


CASES = [
    ("llama", [{"r": 4}, {"r": 2}, {"r": 3, "lora_alpha": 9}], "tensor"),
    ("llama", [{"r": 4, "use_rslora": True}, {"r": 2, "rank_pattern": {"q_proj": 3}}, {"r": 2}], "row"),
    ("llama", [{"r": 4}, {"r": 4, "target_modules": ["q_proj"]}], "layer"),
    ("llama", [{"r": 4, "use_dora": True}, {"r": 2}], "tensor"),
    ("llama", [{"r": 4, "modules_to_save": ["lm_head"]}, {"r": 2}], "tensor"),
    ("gpt2", [{"r": 4, "fan_in_fan_out": True}, {"r": 2, "fan_in_fan_out": True}], "tensor"),
]


@pytest.mark.parametrize("space", ["deltas", "weights"])
@pytest.mark.parametrize(("family", "configs", "block"), CASES)
def test_dense_merges_of_adapters_are_those_of_their_effective_weights(
    base: Any,
    tmp_path: Path,
    family: str,
    configs: list[dict],
    block: str,
    space: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 100)
    folder = base(family)
    experts = [
        make_adapter(folder, tmp_path / f"a{i}", i, **({"target_modules": TARGETS[family]} | config))
        for i, config in enumerate(configs)
    ]
    weights = [0.6, 0.4] if len(experts) == 2 else [0.5, 0.3, 0.2]
    merged = run(experts, tmp_path / "out", folder, weights, space=space, block=block)

    points = [effective(folder, expert) for expert in experts]
    origin = load_file(folder / "model.safetensors")
    names = list(origin)
    groups = [[name] for name in names]
    if block == "layer":
        keys = {name: ".".join(name.split(".")[:3]) if ".layers." in name else name for name in names}
        touched = {n for n in names if any(not torch.equal(p[n], origin[n].double()) for p in points)}
        groups = [[n for n in names if keys[n] == key and n in touched] for key in dict.fromkeys(keys.values())]
        groups += [[n] for n in names if n not in touched]
    for group in filter(None, groups):
        start = torch.cat([origin[n].flatten() for n in group]) if space == "deltas" else None
        flat = [torch.cat([p[n].flatten() for n in group]) for p in points]
        n_blocks = origin[group[0]].shape[0] if block == "row" and origin[group[0]].ndim == 2 else 1
        if all(torch.equal(f.float(), torch.cat([origin[n].flatten() for n in group])) for f in flat):
            expected = torch.cat([origin[n].flatten() for n in group]).numpy()  # untouched by every adapter
        elif space == "deltas":
            expected = _delta_reference(flat, start, weights, n_blocks)
        else:
            expected = merged_reference("karcher", flat, weights, None, n_blocks).ravel()
        actual = torch.cat([merged[n].flatten() for n in group]).double().numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=2e-7)
    assert verify(str(tmp_path / "out")).ok


def _delta_reference(flat: list[torch.Tensor], start: torch.Tensor, weights: list[float], n_blocks: int) -> np.ndarray:
    """Delta-space reference in which experts without a delta have no direction but count in the mean norm."""
    blocks_of = [(f.double() - start.double()).reshape(n_blocks, -1) for f in flat]
    rows = []
    for b in range(n_blocks):
        moved = [i for i in range(len(flat)) if blocks_of[i][b].abs().max() > 1e-12]
        if not moved:
            rows.append(np.zeros(blocks_of[0].shape[1]))
            continue
        mean = merged_reference("karcher", [blocks_of[i][b] for i in moved], [weights[i] for i in moved], None)
        norm = sum(weights[i] * blocks_of[i][b].norm().item() for i in range(len(flat)))
        rows.append(mean / np.linalg.norm(mean) * norm)
    return start.double().numpy() + np.concatenate(rows)


@pytest.mark.parametrize("space", ["deltas", "weights"])
def test_adapters_and_full_checkpoints_merge_together(base: Any, tmp_path: Path, space: str) -> None:
    folder = base("llama")
    adapter = make_adapter(folder, tmp_path / "lora", 1, r=4, target_modules=["q_proj", "up_proj"])
    torch.manual_seed(5)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "full")
    merged = run([adapter, str(tmp_path / "full")], tmp_path / "out", folder, [0.4, 0.6], space=space)

    origin = load_file(folder / "model.safetensors")
    points = [effective(folder, adapter), load_file(tmp_path / "full" / "model.safetensors")]
    for name, start in origin.items():
        flat = [p[name].double().flatten() for p in points]
        if space == "deltas":
            expected = _delta_reference(flat, start.flatten(), [0.4, 0.6], 1)
        else:
            expected = merged_reference("karcher", flat, [0.4, 0.6], None).ravel()
        np.testing.assert_allclose(merged[name].double().flatten().numpy(), expected, rtol=1e-6, atol=2e-7)
    assert verify(str(tmp_path / "out")).ok


def test_one_merge_in_three_outputs_gives_the_same_logits(base: Any, tmp_path: Path) -> None:
    folder = base("llama")
    experts = [make_adapter(folder, tmp_path / f"a{i}", i, r=3, target_modules=["q_proj", "o_proj"]) for i in range(3)]
    ids = torch.arange(30).reshape(2, 15) % 40
    logits = []
    for name, options in (
        ("exact", {"adapter_output": "adapter"}),
        ("full rank", {"adapter_output": "adapter", "adapter_rank": 9}),
        ("dense", {"adapter_output": "merged"}),
    ):
        out = tmp_path / name
        args = MergingArguments(output_dir=str(out), **options)
        run_merge(build_plan(experts, args, None, str(folder)), StepObserver(), Processes())
        if name == "dense":
            model = LlamaForCausalLM.from_pretrained(out)
        else:
            model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), out)
        assert verify(str(out)).ok
        with torch.no_grad():
            logits.append(model.eval()(ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-5, atol=1e-5)


def test_adapters_alone_need_no_base_model(base: Any, tmp_path: Path) -> None:
    folder = base("llama")
    experts = [make_adapter(folder, tmp_path / f"a{i}", i, r=3, target_modules=["q_proj"]) for i in range(2)]
    outcome = run_merge(
        build_plan(experts, MergingArguments(output_dir=str(tmp_path / "out"))), StepObserver(), Processes()
    )
    assert outcome.report.factors.max_rank == 6
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("space", ["deltas", "weights"])
def test_nonfinite_values_of_the_base_are_found_where_only_factors_are_merged(
    base: Any, tmp_path: Path, space: str
) -> None:
    experts = [make_adapter(base("llama"), tmp_path / f"a{i}", i, r=2, target_modules=["q_proj"]) for i in range(2)]
    shutil.copytree(base("llama"), tmp_path / "base")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors[name][3, :2] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"found 2 NaN or infinite values in tensor '{name}' of base model"):
        run(experts, tmp_path / "out", tmp_path / "base", space=space)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the matrices that spectral methods are given."""
    seen: list[tuple[int, ...]] = []

    def watched(rule: Any) -> Any:
        return lambda experts, *rest: (seen.append(experts.deltas.shape[1:]), rule(experts, *rest))[1]

    for name, rule in dict(RULES).items():
        monkeypatch.setitem(RULES, name, watched(rule))
    return seen


@pytest.mark.parametrize(
    ("architecture", "ranks", "are_cores"),
    [("llama", (2, 3, 1), True), ("gpt2", (2, 3, 1), True), ("llama", (8, 8, 2), False)],
)
@pytest.mark.parametrize(
    "method",
    [m.name for m in METHODS.values() if m.kind == "spectral" and m.n_experts is None and not m.needs_factors],
)
def test_spectral_methods_merge_adapters_by_their_cores(
    base: Any,
    tmp_path: Path,
    shapes: list[tuple[int, ...]],
    method: str,
    architecture: str,
    ranks: tuple[int, ...],
    are_cores: bool,
) -> None:
    # The last adapter lacks a module.
    targets = [TARGETS[architecture], TARGETS[architecture], TARGETS[architecture][:-1]]
    folder, weights = base(architecture), [0.5, 0.3, 0.2]
    adapters = [
        make_adapter(folder, tmp_path / str(i), i, r=rank, target_modules=names)
        for i, (rank, names) in enumerate(zip(ranks, targets))
    ]
    merged = run(adapters, tmp_path / "out", folder, weights, method=method)
    assert verify(str(tmp_path / "out")).problems == []
    small = [shape for shape in shapes if min(shape) <= 6]
    assert bool(small) == (are_cores and METHODS[method].cores is not None)
    origin = load_file(folder / "model.safetensors")
    models = [effective(folder, adapter) for adapter in adapters]
    options = SpectralOptions(METHODS[method].density or 1.0)
    for name, start in origin.items():
        if not any(target in name and name.endswith(".weight") for target in TARGETS[architecture]):
            continue
        deltas = np.stack([(model[name] - start.double()).numpy() for model in models])
        given = Experts(deltas.astype(np.float32), start.numpy())
        expected = start.double().numpy() + RULES[method](given, np.array(weights), options)
        error = np.linalg.norm(merged[name].double().numpy() - expected)
        assert error <= 1e-4 * np.linalg.norm(expected - start.double().numpy()), name


def test_an_adapter_beside_a_full_model_is_merged_as_a_matrix(
    base: Any, tmp_path: Path, shapes: list[tuple[int, ...]]
) -> None:
    folder = base("llama")
    adapter = make_adapter(folder, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    full = tmp_path / "full"
    shutil.copytree(folder, full)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in tensors.items()}, full / "model.safetensors", {"format": "pt"})
    run([adapter, str(full)], tmp_path / "out", folder, method="iso_c")
    assert shapes and all(min(shape) >= 8 for shape in shapes)


def test_the_plan_says_what_cores_take(base: Any, tmp_path: Path) -> None:
    folder = base("llama")
    adapters = [make_adapter(folder, tmp_path / f"{i}", i, r=1 + i, target_modules=["down_proj"]) for i in range(2)]
    dora = make_adapter(folder, tmp_path / "dora", 2, r=1, use_dora=True, target_modules=["down_proj"])

    def memory(*experts: str, **options: Any) -> int:
        args = MergingArguments(output_dir=str(tmp_path / "out"), adapter_output="merged", **options)
        plan = build_plan(experts, args, None, str(folder))
        return plan.matrix_memory(next(step for step in plan.steps if "down_proj" in step.name))

    assert memory(*adapters, method="iso_c") == memory_bytes("iso_c", 16, 24, 2, core_rank=3)
    assert memory(*adapters, method="knots") == memory_bytes("knots", 16, 24, 2, core_rank=3)
    whole = memory_bytes("ace", 16, 24, 2)
    assert memory(*adapters, method="ace") == memory(*adapters, method="tsv_m", post_step="svc") == whole
    assert memory(adapters[0], dora, method="iso_c") == memory(adapters[0], str(folder), method="iso_c") == whole
