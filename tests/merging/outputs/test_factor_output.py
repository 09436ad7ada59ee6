"""Merging adapters in factor space, against dense float64 references and against PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_merges import load_base, make_adapter, merge_adapters, peft_deltas
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from threadpoolctl import ThreadpoolController, threadpool_limits
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_frmerge.checkpoints.adapters.adapter import Adapter, open_adapter
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.errors import AmbiguousMeanError, ArgumentError, CheckpointError, MergeError
from hf_frmerge.geometry.core_space import core_space
from hf_frmerge.geometry.lowrank import Factors, recompress
from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.outputs import merged_factors
from hf_frmerge.merging.outputs.factor_output import FactorOutput
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.methods.table import METHODS

LLAMA = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    LlamaForCausalLM(LLAMA).save_pretrained(folder / "llama")
    GPT2LMHeadModel(GPT2).save_pretrained(folder / "gpt2")
    return {"llama": folder / "llama", "gpt2": folder / "gpt2"}


def read(folder: Path) -> Adapter:
    return open_adapter(Source(str(folder), "adapter", str(folder)))


def karcher_dense(points: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Weighted Karcher mean of directions by gradient steps on dense vectors, norm by the weighted mean of norms."""
    norms = np.array([np.linalg.norm(point) for point in points])
    moving = norms > 0
    units = [point / norm for point, norm in zip(points, norms) if norm > 0]
    shares = weights[moving] / weights[moving].sum()
    mean = sum(share * unit for share, unit in zip(shares, units))
    mean /= np.linalg.norm(mean)
    for _ in range(200):
        step = np.zeros_like(mean)
        for share, unit in zip(shares, units):
            angle = 2 * math.asin(min(1.0, np.linalg.norm(mean - unit) / 2))
            step += share / np.sinc(angle / np.pi) * (unit - np.vdot(mean, unit) * mean)
        size = np.linalg.norm(step)
        if size < 1e-14:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean /= np.linalg.norm(mean)
    return float(weights @ norms) * mean


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
TABLE = {
    "plain": ("llama", [LINEAR] * 3),
    "rslora": ("llama", [LINEAR | {"use_rslora": True}, LINEAR, LINEAR | {"use_rslora": True, "r": 6}]),
    "rank_pattern": (
        "llama",
        [LINEAR | {"rank_pattern": {"q_proj": 2}}, LINEAR | {"rank_pattern": {"layers.1.mlp.down_proj": 5}}],
    ),
    "alpha_pattern": (
        "llama",
        [LINEAR | {"alpha_pattern": {"q_proj": 3}}, LINEAR | {"alpha_pattern": {"down_proj": 1}}],
    ),
    "fan_in_fan_out": ("gpt2", [{"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}] * 2),
    "embeddings": ("llama", [{"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}] * 2),
    "differing_ranks": ("llama", [LINEAR | {"r": r} for r in (1, 4, 7)]),
    "missing_modules": (
        "llama",
        [LINEAR, LINEAR | {"target_modules": ["q_proj"]}, LINEAR | {"target_modules": ["down_proj", "v_proj"]}],
    ),
}
TABLE |= {f"n_{n}": ("llama", [LINEAR | {"target_modules": ["q_proj"]}] * n) for n in range(2, 9)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", TABLE)
def test_peft_loads_the_karcher_mean_of_the_dense_deltas(
    bases: dict[str, Path], tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    architecture, configs = TABLE[case]
    base = bases[architecture]
    folders = [make_adapter(base, tmp_path / f"{i}", i, dtype, **config) for i, config in enumerate(configs)]
    weights = np.arange(1, len(folders) + 1, dtype=float)
    weights /= weights.sum()
    report = merge_adapters(folders, weights.tolist(), tmp_path / "merged")

    sources = [peft_deltas(base, folder) for folder in folders]
    merged = peft_deltas(base, tmp_path / "merged")
    assert set(merged) == {name for source in sources for name in source}
    assert {module.module for module in report.modules} == set(merged)
    # Each written factor is rounded once: 2^-24 relative in fp32, 2^-9 in bf16.
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
    for name, actual in merged.items():
        points = [source.get(name, np.zeros_like(actual)) for source in sources]
        assert relative_error(actual, karcher_dense(points, weights)) < tolerance
    for module in report.modules:
        assert module.geometry.unconverged == ()
        assert module.truncation_error == 0.0
        assert module.norm == pytest.approx(np.linalg.norm(merged[module.module]), rel=tolerance)


@pytest.mark.parametrize("method", ["linear", "nre", "task_arithmetic", "slerp"])
def test_every_span_method_gives_its_combination_of_dense_deltas(
    bases: dict[str, Path], tmp_path: Path, method: str
) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **LINEAR) for i in range(2)]
    weights = [0.3, 0.7]
    options = {"scale": 0.5} if method == "task_arithmetic" else {}
    merge_adapters(folders, weights, tmp_path / "merged", method=method, **options)
    sources = [peft_deltas(bases["llama"], folder) for folder in folders]
    for name, actual in peft_deltas(bases["llama"], tmp_path / "merged").items():
        x, y = (source[name] for source in sources)
        mean = 0.3 * x + 0.7 * y
        length = 0.3 * np.linalg.norm(x) + 0.7 * np.linalg.norm(y)
        expected = {
            "linear": mean,
            "nre": mean * length / np.linalg.norm(mean),
            "task_arithmetic": 0.5 * mean,
            "slerp": karcher_dense([x, y], np.array(weights)),
        }[method]
        assert relative_error(actual, expected) < 1e-6


def test_merged_logits_equal_those_of_the_dense_merge(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    folders = [make_adapter(base, tmp_path / f"{i}", i, **LINEAR) for i in range(3)]
    merge_adapters(folders, [0.2, 0.3, 0.5], tmp_path / "merged")
    dense = load_base(base)
    # merge_and_unload of each adapter, minus the base, is a second way to its delta
    base_weights = {name: value.double() for name, value in load_base(base).state_dict().items()}
    points = [PeftModel.from_pretrained(load_base(base), f).merge_and_unload().state_dict() for f in folders]
    state = dense.state_dict()
    for name in state:
        if "q_proj" in name or "down_proj" in name:
            deltas = [(point[name].double() - base_weights[name]).numpy() for point in points]
            mean = karcher_dense(deltas, np.array([0.2, 0.3, 0.5]))
            state[name].copy_(base_weights[name] + torch.from_numpy(mean))
    tokens = torch.arange(12)[None]
    unmerged = PeftModel.from_pretrained(load_base(base), tmp_path / "merged").eval()
    with torch.no_grad():
        expected = dense.eval()(tokens).logits
        as_adapter = unmerged(tokens).logits
        as_weights = unmerged.merge_and_unload()(tokens).logits
    torch.testing.assert_close(as_adapter, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(as_weights, expected, rtol=2e-5, atol=2e-5)


def test_recompression_loses_the_discarded_singular_values(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **LINEAR) for i in range(3)]
    merge_adapters(folders, [1 / 3] * 3, tmp_path / "exact")
    exact = peft_deltas(bases["llama"], tmp_path / "exact")
    report = merge_adapters(folders, [1 / 3] * 3, tmp_path / "small", adapter_rank=5)
    small = peft_deltas(bases["llama"], tmp_path / "small")
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5
    assert not config["rank_pattern"]
    lost, total = 0.0, 0.0
    for module in report.modules:
        values = np.linalg.svd(exact[module.module], compute_uv=False)
        discarded = math.sqrt(np.sum(values[5:] ** 2) / np.sum(values**2))
        assert module.truncation_error == pytest.approx(discarded, rel=1e-5)
        assert relative_error(small[module.module], exact[module.module]) == pytest.approx(discarded, rel=1e-5)
        lost += np.sum(values[5:] ** 2)
        total += np.sum(values**2)
    assert report.truncation_error == pytest.approx(math.sqrt(lost / total), rel=1e-5)


UNEVEN = [LINEAR | {"rank_pattern": {"q_proj": 2}}, LINEAR | {"use_rslora": True, "r": 6}]


@pytest.mark.parametrize(
    "options", [{}, {"adapter_energy": 0.7}, {"adapter_rank": 3}], ids=["exact", "energy", "rank"]
)
def test_a_uniform_rank_changes_no_delta(bases: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **config) for i, config in enumerate(UNEVEN)]
    merge_adapters(folders, [0.4, 0.6], tmp_path / "auto", **options)
    report = merge_adapters(folders, [0.4, 0.6], tmp_path / "even", adapter_rank_pattern="uniform", **options)
    config = json.loads((tmp_path / "even" / "adapter_config.json").read_text())
    before = json.loads((tmp_path / "auto" / "adapter_config.json").read_text())
    most = max([before["r"], *before["rank_pattern"].values()])
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (most, most, {}, {})
    tensors = load_file(tmp_path / "even" / "adapter_model.safetensors")
    assert {value.shape[0 if "lora_A" in name else 1] for name, value in tensors.items()} == {most}
    auto, even = (peft_deltas(bases["llama"], tmp_path / name) for name in ("auto", "even"))
    for name, delta in even.items():
        assert relative_error(delta, auto[name]) < 1e-12
        # A runtime that reads one rank and one alpha sees the same.
        down, up = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        assert relative_error((config["lora_alpha"] / config["r"] * up @ down).numpy(), delta) < 1e-12
    assert not [note for note in report.notes if "rank_pattern" in note]


def test_ranks_that_differ_are_told_with_advice_that_works(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **config) for i, config in enumerate(UNEVEN)]
    (note,) = [
        note for note in merge_adapters(folders, [0.4, 0.6], tmp_path / "auto").notes if "have ranks from" in note
    ]
    assert "adapter_rank_pattern='uniform' (--adapter-rank-pattern uniform) gives all of them rank 10" in note
    even = merge_adapters(folders, [0.4, 0.6], tmp_path / "even", adapter_rank_pattern="uniform")
    assert {module.rank for module in even.modules} == {10}


def test_an_energy_bound_chooses_the_smallest_rank_per_module(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **LINEAR) for i in range(3)]
    merge_adapters(folders, [0.2, 0.3, 0.5], tmp_path / "exact")
    exact = peft_deltas(bases["llama"], tmp_path / "exact")
    report = merge_adapters(folders, [0.2, 0.3, 0.5], tmp_path / "small", adapter_energy=0.9)
    small = peft_deltas(bases["llama"], tmp_path / "small")
    assert len({module.rank for module in report.modules}) > 1  # so that the rank pattern is put to the test
    for module in report.modules:
        values = np.linalg.svd(exact[module.module], compute_uv=False) ** 2
        share = np.cumsum(values) / np.sum(values)
        assert module.rank == 1 + np.argmax(share >= 0.9)
        assert relative_error(small[module.module], exact[module.module]) ** 2 <= 0.1 + 1e-6


def test_karcher_in_core_space_is_karcher_of_dense_deltas() -> None:
    rng = np.random.default_rng(0)
    factors = [
        Factors(rng.normal(size=(30, r)), rng.normal(size=(r, 20)), s) for r, s in ((3, 2.0), (1, 0.5), (4, 1.0))
    ]
    weights = np.array([0.5, 0.2, 0.3])
    core = core_space(factors)
    pair = core.factors(karcher_dense(list(core.cores), weights))
    dense = karcher_dense([f.scale * f.B @ f.A for f in factors], weights)
    assert relative_error(pair.scale * pair.B @ pair.A, dense) < 1e-12


def test_one_hot_weights_return_that_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, torch.bfloat16, **LINEAR) for i in range(3)]
    report = merge_adapters(folders, [0.0, 1.0, 0.0], tmp_path / "merged")
    assert {module.rank for module in report.modules} == {4}
    chosen, merged = (
        load_file(folders[1] / "adapter_model.safetensors"),
        load_file(tmp_path / "merged/adapter_model.safetensors"),
    )
    for name, tensor in chosen.items():
        scale = 2.0 if "lora_B" in name else 1.0  # alpha / r of the source, folded in: exact
        assert torch.equal(merged[name], tensor * scale)


def test_identical_adapters_return_the_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = make_adapter(bases["llama"], tmp_path / "a", 1, **LINEAR)
    report = merge_adapters([folder] * 3, [0.2, 0.3, 0.5], tmp_path / "merged", adapter_rank=4)
    source, merged = peft_deltas(bases["llama"], folder), peft_deltas(bases["llama"], tmp_path / "merged")
    assert report.truncation_error < 1e-12
    for name, delta in source.items():
        assert relative_error(merged[name], delta) < 1e-6


def edit_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(
        {name: change(name, tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"}
    )


def test_antipodal_adapters_are_refused_by_name_or_averaged(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / name, 1, **LINEAR) for name in "ab"]
    edit_tensors(folders[1], lambda name, tensor: -tensor if "lora_B" in name else tensor)
    with pytest.raises(AmbiguousMeanError, match=r"layers\.0\.mlp\.down_proj\.weight.*/a'.*/b'"):
        merge_adapters(folders, [0.5, 0.5], tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merge_adapters(folders, [0.75, 0.25], tmp_path / "merged", on_ambiguous="linear", overwrite=True)
    source, merged = peft_deltas(bases["llama"], folders[0]), peft_deltas(bases["llama"], tmp_path / "merged")
    for name, delta in source.items():
        assert relative_error(merged[name], 0.5 * delta) < 1e-6


def test_a_zero_adapter_has_no_direction_but_a_norm(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / name, i, **LINEAR) for i, name in enumerate("abc")]
    edit_tensors(folders[2], lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    weights = np.array([0.5, 0.3, 0.2])
    report = merge_adapters(folders, weights.tolist(), tmp_path / "merged")
    assert any("zero delta in 4 of 4 modules" in note and "/c'" in note for note in report.notes)
    assert {module.rank for module in report.modules} == {8}
    sources = [peft_deltas(bases["llama"], folder) for folder in folders]
    for name, actual in peft_deltas(bases["llama"], tmp_path / "merged").items():
        assert relative_error(actual, karcher_dense([source[name] for source in sources], weights)) < 1e-6


def test_adapters_that_are_all_zero_give_a_zero_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / name, i, **LINEAR) for i, name in enumerate("ab")]
    for folder in folders:
        edit_tensors(folder, lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)
    report = merge_adapters(folders, [0.5, 0.5], tmp_path / "merged")
    assert all(not delta.any() for delta in peft_deltas(bases["llama"], tmp_path / "merged").values())
    assert report.truncation_error == 0.0


def test_missing_modules_are_noted_and_strict_refuses(bases: dict[str, Path], tmp_path: Path) -> None:
    first = make_adapter(bases["llama"], tmp_path / "a", 0, **LINEAR)
    second = make_adapter(bases["llama"], tmp_path / "b", 1, **LINEAR | {"target_modules": ["q_proj"]})
    folders = [first, second]
    report = merge_adapters(folders, [0.5, 0.5], tmp_path / "merged")
    assert any(f"{str(second)!r} does not change 2 of 4 modules" in note for note in report.notes)
    with pytest.raises(CheckpointError, match=r"/b' does not change model\.layers\.0\.mlp\.down_proj"):
        merge_adapters(folders, [0.5, 0.5], tmp_path / "strict", strict=True)


def test_one_sphere_per_layer_or_model_has_one_set_of_coefficients(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **LINEAR) for i in range(2)]
    sources = [peft_deltas(bases["llama"], folder) for folder in folders]
    names = sorted(sources[0])
    for block, keys in {"layer": ["layers.0.", "layers.1."], "model": [""]}.items():
        merge_adapters(folders, [0.4, 0.6], tmp_path / block, block=block)
        merged = peft_deltas(bases["llama"], tmp_path / block)
        for key in keys:
            mine = [name for name in names if key in name]
            points = [np.concatenate([source[name].ravel() for name in mine]) for source in sources]
            actual = np.concatenate([merged[name].ravel() for name in mine])
            assert relative_error(actual, karcher_dense(points, np.array([0.4, 0.6]))) < 1e-6


def test_weights_by_module(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **LINEAR) for i in range(2)]

    rules = [".*q_proj.*=1,0", ".*=0,1"]
    report = merge_adapters(folders, [0.5, 0.5], tmp_path / "merged", weight_rules=rules)
    for module in report.modules:
        assert module.coefficients == ([1.0, 0.0] if "q_proj" in module.target else [0.0, 1.0])
    with pytest.raises(ArgumentError, match=r"both lie on one sphere \(group 'model\.layers\.0'\)"):
        merge_adapters(folders, [0.5, 0.5], tmp_path / "layer", weight_rules=rules, block="layer")


def test_what_no_adapter_can_express_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    plain = make_adapter(base, tmp_path / "plain", 0, **LINEAR)
    dora = make_adapter(base, tmp_path / "dora", 1, **LINEAR | {"use_dora": True})
    saved = make_adapter(base, tmp_path / "saved", 2, **LINEAR | {"modules_to_save": ["lm_head"]})
    gpt2 = make_adapter(bases["gpt2"], tmp_path / "gpt2", 2, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    refusals = [
        (dora, {}, r'/dora.*use_dora is set.*adapter_output="merged"'),
        (saved, {}, r'/saved.*modules_to_save: lm_head\.weight.*adapter_output="merged"'),
        (gpt2, {}, r"different base models"),
        (plain, {"block": "row"}, r"block='row'"),
        (plain, {"method": "ties"}, r"ties takes single deltas apart.*adapter_output='merged'"),
    ]
    for other, options, message in refusals:
        with pytest.raises((ArgumentError, CheckpointError), match=message):
            merge_adapters([plain, other], [0.5, 0.5], tmp_path / "merged", adapter_output="adapter", **options)
    assert not (tmp_path / "merged").exists()


def test_a_module_under_two_names_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / name, 0, **LINEAR) for name in "ab"]
    path = folders[1] / "adapter_model.safetensors"
    save_file({name.replace("model.model.", "model."): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"names a module 'model\.layers.*/b' may name 'layers.*Pass base_model"):
        merge_adapters(folders, [0.5, 0.5], tmp_path / "merged")


def test_the_written_config_is_that_of_a_plain_lora(bases: dict[str, Path], tmp_path: Path) -> None:
    first = LINEAR | {"use_rslora": True, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", "layers_to_transform": [0]}
    folders = [
        make_adapter(bases["llama"], tmp_path / "a", 0, **first),
        make_adapter(bases["llama"], tmp_path / "b", 1, **LINEAR | {"r": 2}),
    ]
    merge_adapters(folders, [0.5, 0.5], tmp_path / "merged", dtype="bfloat16")
    config = LoraConfig.from_pretrained(tmp_path / "merged")
    assert config.base_model_name_or_path == str(bases["llama"])
    assert (config.task_type, config.use_rslora, config.inference_mode) == ("CAUSAL_LM", False, True)
    assert (config.layers_to_transform, config.lora_dropout) == (None, 0.0)
    ranks = {f"model.layers.{i}.{name}": 6 - 4 * i for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert set(config.target_modules) == set(ranks)
    for module, delta in ((delta.module, delta) for delta in read(tmp_path / "merged").deltas.values()):
        assert (delta.rank, delta.scale) == (ranks[module], 1.0)
        assert delta.up.dtype == "BF16"
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == [
        ".frmerge_sources.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_coefficients.safetensors",
        "merge_manifest.json",
    ]


def test_a_failed_write_leaves_nothing_that_loads(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = make_adapter(bases["llama"], tmp_path / "a", 1, **LINEAR | {"lora_alpha": 400000})
    with pytest.raises(MergeError, match=r"more than float16 can\. Write it with dtype='bfloat16'"):
        merge_adapters([folder] * 2, [0.5, 0.5], tmp_path / "merged", dtype="float16")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == [".frmerge"]


class Listener(StepObserver):
    """Notes what ends, and may stop the merge after some modules."""

    def __init__(self, last: int = 99) -> None:
        self.ended: list[str] = []
        self._last = last

    def end(self, outcome: StepOutcome) -> bool:
        self.ended.append(outcome.step.name)
        return len(self.ended) < self._last


def test_the_result_does_not_depend_on_threads(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **LINEAR) for i in range(3)]
    files = []
    for workers in (1, 3):
        listener = Listener()
        merge_adapters(folders, [0.2, 0.3, 0.5], tmp_path / f"w{workers}", listener, num_workers=workers)
        files.append((tmp_path / f"w{workers}" / "adapter_model.safetensors").read_bytes())
        assert listener.ended == list(read(folders[0]).deltas)
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"adapter_rank": 3}, {"adapter_energy": 0.7}, {"adapter_energy": 0.7, "adapter_rank_pattern": "uniform"}],
    ids=["exact", "rank", "energy", "uniform"],
)
def test_a_failed_merge_resumes_to_the_same_bits(
    bases: dict[str, Path], tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **LINEAR) for i in range(3)]
    merge_adapters(folders, [0.2, 0.3, 0.5], tmp_path / "whole", **options)
    write, count = FactorOutput.merge, 0

    def fail_at_the_third(*args: Any) -> str:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(FactorOutput, "merge", fail_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            merge_adapters(folders, [0.2, 0.3, 0.5], tmp_path / "out", num_workers=1, **options)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    report = merge_adapters(folders, [0.2, 0.3, 0.5], tmp_path / "out", resume_from_checkpoint=True, **options)
    for name in ("adapter_model.safetensors", "adapter_config.json", "merge_coefficients.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    recorded = [read_manifest(tmp_path / name).tensors for name in ("out", "whole")]
    assert recorded[0] == recorded[1]
    assert report.truncation_error == read_manifest(tmp_path / "whole").report.factors.truncation_error


def test_what_was_written_before_a_stop_is_recorded_after_the_resume(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **LINEAR) for i in range(2)]
    merge_adapters(folders, [0.4, 0.6], tmp_path / "whole", adapter_rank=2)

    def stop(*args: Any) -> dict[str, Path]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FactorOutput, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_adapters(folders, [0.4, 0.6], tmp_path / "out", adapter_rank=2)
    merge_adapters(folders, [0.4, 0.6], tmp_path / "out", adapter_rank=2, resume_from_checkpoint=True)
    whole, resumed = (read_manifest(tmp_path / name) for name in ("whole", "out"))
    assert resumed.tensors == whole.tensors
    assert resumed.report.factors == whole.report.factors
    assert {tensor.rank for tensor in resumed.tensors.values()} == {2}


def test_every_method_of_the_table_runs_on_adapters(bases: dict[str, Path], tmp_path: Path) -> None:
    folders = [make_adapter(bases["llama"], tmp_path / f"{i}", i, **LINEAR) for i in range(2)]
    for method in (method.name for method in METHODS.values() if method.kind == "span"):
        report = merge_adapters(folders, [0.5, 0.5], tmp_path / method, method=method)
        assert report.modules[0].geometry.norms == pytest.approx(
            [
                np.linalg.norm(peft_deltas(bases["llama"], tmp_path / f"{i}")[report.modules[0].module])
                for i in range(2)
            ],
            rel=1e-6,
        )


def test_modules_are_recompressed_with_one_blas_thread_each(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has threads of its own: BLAS threads below each of them spin for the same cores."""
    experts = [
        make_adapter(bases["llama"], tmp_path / f"e{seed}", seed, r=4, target_modules=["q_proj", "v_proj"])
        for seed in (1, 2)
    ]
    blas = ThreadpoolController().select(user_api="blas")
    seen: list[int] = []

    def watched(*args: Any) -> Any:
        seen.extend(library["num_threads"] for library in blas.info())
        return recompress(*args)

    monkeypatch.setattr(merged_factors, "recompress", watched)
    with threadpool_limits(2, user_api="blas"):
        before = [library["num_threads"] for library in blas.info()]
        if 2 not in before:
            pytest.skip("the BLAS of numpy has one thread, or is not known to threadpoolctl")
        merge_adapters(experts, [0.5, 0.5], tmp_path / "out", adapter_rank=4)
        assert [library["num_threads"] for library in blas.info()] == before
    assert set(seen) == {1}
