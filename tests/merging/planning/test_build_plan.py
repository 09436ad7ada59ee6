"""Bad input is refused from headers alone, in a sentence that names it, and nothing is written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from merge_reference import SHAPES, random_model, write_family, write_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge.errors import ArgumentError, CheckpointError, HubError, MergeError
from hf_frmerge.hub.card.licences import licences_of_plan
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.output_folder import check_output_dir
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.plan import MergePlan
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.verify import verify

Plan = Callable[..., MergePlan]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `base` and the experts `e0`, `e1`, `e2`."""
    root = tmp_path_factory.mktemp("family")
    write_family(root)
    return root


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny Llama `base` and two LoRA adapters of it, `a0` and `a1`."""
    root = tmp_path_factory.mktemp("adapters")
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for seed in range(2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), lora).save_pretrained(root / f"a{seed}")
    return root


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Plan a merge into `tmp_path/out`."""

    def build(experts: list[Any], weights: list[float] | None = None, base: Any = None, **options: Any) -> MergePlan:
        args = MergingArguments(**{"output_dir": str(tmp_path / "out"), **options})
        return build_plan([str(e) for e in experts], args, weights, str(base) if base else None, check=_check_output)

    return build


def _check_output(plan: MergePlan) -> None:
    check_output_dir(plan.args, [model.source.path for model in plan.models])


def refused(error: type[MergeError], call: Callable[[], object], output: Path) -> str:
    """Return the sentence of an error that must come before anything is written."""
    before = snapshot(output)
    with pytest.raises(error) as caught:
        call()
    assert snapshot(output) == before
    message = str(caught.value)
    assert "Traceback" not in message and message.endswith((".", "?", ")", ")."))
    return message


def snapshot(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_experts(plan: Plan, family: Path, tmp_path: Path, n: int) -> None:
    experts = [family / "e0"] * n
    assert f"at least two experts, got {n}" in refused(ArgumentError, lambda: plan(experts), tmp_path / "out")


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([0.5, 0.5], ["one number per expert", "got 2 ([0.5, 0.5]) for 3 experts"]),
        ([0.5, 0.3, 0.1, 0.1], ["got 4", "for 3 experts"]),
        ([0.5, -0.25, 0.5], ["the weight of expert 2 is -0.25"]),
        ([0.5, 0.5, math.nan], ["the weight of expert 3 is nan"]),
        ([math.inf, 0.5, 0.5], ["the weight of expert 1 is inf"]),
        ([0.0, 0.0, 0.0], ["all zero"]),
    ],
)
def test_bad_weights(plan: Plan, family: Path, tmp_path: Path, weights: list[float], parts: list[str]) -> None:
    experts = [family / f"e{i}" for i in range(3)]
    message = refused(ArgumentError, lambda: plan(experts, weights), tmp_path / "out")
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "karchr"}, "unknown method 'karchr': expected one of karcher, slerp, linear"),
        ({"method": "karchr"}, "Did you mean 'karcher'?"),
        ({"dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({"dtype": "float61"}, "Did you mean 'float"),
        ({"space": "delta"}, "Did you mean 'deltas'?"),
        ({"block": "rows"}, "Did you mean 'row'?"),
    ],
)
def test_unknown_words_get_the_nearest_known_one(
    plan: Plan, family: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    experts = [family / "e0", family / "e1"]
    assert sentence in refused(ArgumentError, lambda: plan(experts, **options), tmp_path / "out")


def test_a_method_that_needs_a_base_or_two_experts(plan: Plan, family: Path, tmp_path: Path) -> None:
    three, out = [family / f"e{i}" for i in range(3)], tmp_path / "out"
    assert "exactly 2 experts, got 3" in refused(ArgumentError, lambda: plan(three, method="slerp"), out)
    assert "needs base_model" in refused(ArgumentError, lambda: plan(three, space="deltas"), out)
    for space in (None, "weights", "deltas"):
        message = refused(ArgumentError, lambda s=space: plan(three, method="task_arithmetic", space=s), out)
        assert "base_model" in message
    with_base = {"base": family / "base", "method": "task_arithmetic"}
    assert "deltas" in refused(ArgumentError, lambda: plan(three, space="weights", **with_base), out)
    assert plan(three, **with_base).space == "deltas"


def test_weights_are_not_scaled(plan: Plan, family: Path, tmp_path: Path) -> None:
    three, with_base = [family / f"e{i}" for i in range(3)], {"base": family / "base"}
    for space in (None, "weights"):
        message = refused(
            ArgumentError, lambda s=space: plan(three, scale=2.0, space=s, **with_base), tmp_path / "out"
        )
        assert "scale=2" in message and "--space deltas" in message
    assert plan(three, scale=2.0, space="deltas", **with_base).args.scale == 2.0  # what the message says


@pytest.mark.parametrize(
    ("config", "is_adapter"), [({}, True), ({"use_dora": True}, False), ({"modules_to_save": ["lm_head"]}, False)]
)
def test_only_plain_lora_becomes_an_adapter_unasked(
    plan: Plan, adapters: Path, tmp_path: Path, config: dict[str, Any], is_adapter: bool
) -> None:
    """A mean of DoRA, or of modules saved whole, is no product of two factors: `auto` makes it a full model."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **config)
    get_peft_model(LlamaForCausalLM.from_pretrained(adapters / "base"), lora).save_pretrained(tmp_path / "other")
    made = plan([adapters / "a0", tmp_path / "other"], base=adapters / "base")
    assert (made.layout is None) == is_adapter


def test_a_gradient_runs_over_the_stack_that_a_tensor_belongs_to(plan: Plan, tmp_path: Path) -> None:
    depths = {"encoder.block": 4, "decoder.block": 2}
    names = [f"{stack}.{layer}.wi.weight" for stack, depth in depths.items() for layer in range(depth)]
    experts = [
        write_model(
            tmp_path / f"t{seed}", {name: torch.full((2, 2), 1.0 + seed) for name in [*names, "shared.weight"]}
        )
        for seed in range(2)
    ]
    made = plan(experts, [0.25, 0.75], weight_rules=[r"block\.=1:0,0:1"])
    expected = {
        f"{stack}.{layer}.wi.weight": (1 - layer / (depth - 1), layer / (depth - 1))
        for stack, depth in depths.items()
        for layer in range(depth)
    }
    actual = {step.name: step.weights for step in made.steps}
    assert actual == {name: pytest.approx(pair) for name, pair in expected.items()} | {"shared.weight": (0.25, 0.75)}


# The output folder


def test_an_output_folder_that_is_an_input(plan: Plan, family: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(family / "base")
    for output in (family / "e1", link):
        message = refused(
            ArgumentError,
            lambda output=output: plan(
                [family / "e0", family / "e1"], base=family / "base", output_dir=str(output), overwrite=True
            ),
            output,
        )
        assert f"{str(output)!r} is also an input" in message


def test_an_output_folder_that_is_not_empty_or_a_file(plan: Plan, family: Path, tmp_path: Path) -> None:
    out, experts = tmp_path / "out", [family / "e0", family / "e1"]
    out.write_text("a file")
    assert "is a file" in refused(ArgumentError, lambda: plan(experts), out)
    # Neither option can turn a file into a folder.
    assert "is a file" in refused(ArgumentError, lambda: plan(experts, overwrite=True), out)
    assert "is a file" in refused(ArgumentError, lambda: plan(experts, resume_from_checkpoint=True), out)
    out.unlink()
    out.mkdir()
    assert plan(experts).steps  # empty: fine
    (out / "notes.txt").write_text("mine")
    message = refused(ArgumentError, lambda: plan(experts), out)
    assert f"{str(out)!r} is not empty" in message and "--overwrite" in message
    assert plan(experts, overwrite=True).steps and (out / "notes.txt").read_text() == "mine"


# Adapters


def test_adapters_and_the_base_they_need(plan: Plan, adapters: Path, family: Path, tmp_path: Path) -> None:
    out, pair, base = tmp_path / "out", [adapters / "a0", adapters / "a1"], adapters / "base"
    dense = {"adapter_output": "merged"}
    message = refused(ArgumentError, lambda: plan(pair, **dense), out)
    assert f"{str(pair[0])!r} is an adapter: pass the model it was trained from as base_model" in message
    assert str(base) in message  # what its config names
    mixed = [base, adapters / "a1"]
    assert f"{str(mixed[1])!r} is an adapter" in refused(ArgumentError, lambda: plan(mixed), out)
    message = refused(ArgumentError, lambda: plan(mixed, base=base, adapter_output="adapter"), out)
    assert f"needs adapters only, but {str(base)!r} is a full checkpoint" in message
    message = refused(ArgumentError, lambda: plan(pair, base=base, adapter_output="adapter", space="weights"), out)
    assert "no adapter can express" in message
    message = refused(ArgumentError, lambda: plan(mixed, base=pair[0]), out)
    assert f"The base model {str(pair[0])!r} is an adapter; a full checkpoint is needed" in message
    assert plan(pair, base=base).output_kind == "adapter"
    assert plan(pair, base=base, **dense).output_kind == "full"


def test_an_adapter_of_another_model(plan: Plan, adapters: Path, family: Path, tmp_path: Path) -> None:
    message = refused(
        CheckpointError, lambda: plan([adapters / "a0", adapters / "a1"], base=family / "base"), tmp_path
    )
    assert "a0" in message and "q_proj" in message


# Checkpoints


def test_a_folder_that_is_not_there(plan: Plan, family: Path, tmp_path: Path) -> None:
    for missing in (tmp_path / "nowhere", "./nowhere"):
        message = refused(CheckpointError, lambda m=missing: plan([family / "e0", m]), tmp_path / "out")
        assert f"There is no folder {str(missing)!r}" in message


def test_a_hub_id_that_is_not_there(plan: Plan, family: Path, tmp_path: Path, hub: Any) -> None:
    message = refused(HubError, lambda: plan([family / "e0", "ann/nothing"]), tmp_path / "out")
    assert "'ann/nothing'" in message


def test_pickles_are_only_opened_when_asked_for(plan: Plan, family: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text("{}")
    torch.save({}, bad / "pytorch_model.bin")
    message = refused_any(CheckpointError, lambda: plan([family / "e0", bad]), tmp_path / "out")
    assert f"{str(bad)!r} has pickle weights only (pytorch_model.bin)" in message
    assert "with --allow-pickle (allow_pickle)" in message


def refused_any(error: type[MergeError], call: Callable[[], object], output: Path) -> str:
    with pytest.raises(error) as caught:
        call()
    assert not output.exists()
    return str(caught.value)


def test_a_truncated_file_is_named_with_both_sizes(plan: Plan, family: Path, tmp_path: Path) -> None:
    bad = Path(write_model(tmp_path / "bad", random_model(5)))
    file = bad / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size - 100)
    message = refused(CheckpointError, lambda: plan([family / "e0", bad]), tmp_path / "out")
    assert str(bad) in message and "model.safetensors" in message
    numbers = message.replace(",", "")
    assert str(size) in numbers and str(size - 100) in numbers


def test_a_missing_shard_is_named(plan: Plan, family: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    ).save_pretrained(bad, max_shard_size="5KB")
    shard = sorted(bad.glob("model-*.safetensors"))[1]
    shard.unlink()
    message = refused(CheckpointError, lambda: plan([family / "e0", bad]), tmp_path / "out")
    assert f"{str(bad)!r}" in message and f"{shard.name!r}, which is not in the folder" in message


def test_other_shapes_and_names(plan: Plan, family: Path, tmp_path: Path) -> None:
    tensors = load_file(family / "e0" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    wide = write_model(tmp_path / "wide", tensors | {name: torch.zeros(41, 24)})
    message = refused(CheckpointError, lambda: plan([family / "e0", wide]), tmp_path / "out")
    assert f"{name} is [41, 24] in {wide!r} and [40, 24] in {str(family / 'e0')!r}" in message

    renamed = {("other.weight" if key == name else key): tensor for key, tensor in tensors.items()}
    other = write_model(tmp_path / "other", renamed)
    message = refused(CheckpointError, lambda: plan([family / "e0", other]), tmp_path / "out")
    assert all(part in message for part in (other, str(family / "e0"), name, "other.weight"))
    # A base with other tensors is no base of these experts.
    message = refused(CheckpointError, lambda: plan([family / "e0", family / "e1"], base=other), tmp_path / "out")
    assert other in message and name in message


# What a good plan says


def test_a_plan_reads_headers_only(plan: Plan, family: Path, tmp_path: Path) -> None:
    experts = []
    for i in range(2):  # headers of a real model over a file with a hole in place of the weights
        folder = tmp_path / f"hole{i}"
        folder.mkdir()
        (folder / "config.json").write_bytes((family / "e0" / "config.json").read_bytes())
        source = family / "e0" / "model.safetensors"
        header = 8 + int.from_bytes(source.read_bytes()[:8], "little")
        with (folder / "model.safetensors").open("wb") as file:
            file.write(source.read_bytes()[:header])
            file.truncate(source.stat().st_size)
        experts.append(folder)
    actual = plan([*experts, family / "e2"], [2, 1, 1], dtype="bfloat16").describe()
    numel = sum(math.prod(shape) for shape in SHAPES.values())
    assert (actual["n_merge"], actual["n_copy"], actual["n_parameters"]) == (len(SHAPES), 0, numel)
    assert (actual["input_bytes"], actual["output_bytes"]) == (3 * 4 * numel, 2 * numel)
    assert [expert["weight"] for expert in actual["experts"]] == [0.5, 0.25, 0.25]
    assert actual["shards"] == ["model.safetensors"]
    assert not (tmp_path / "out").exists()


def test_notes_of_a_plan_say_what_differs(plan: Plan, family: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    save_file(load_file(family / "e0" / "model.safetensors"), folder / "model.safetensors")
    (folder / "config.json").write_text((family / "e0" / "config.json").read_text().replace("llama", "mistral"))
    notes = plan([family / "e0", folder, folder], weight_rules=["nothing=1,0,0"]).notes
    assert any("model_type" in note and "mistral" in note for note in notes)
    assert any("listed twice" in note for note in notes)
    assert any("'nothing=1,0,0' decides no tensor's weights" in note for note in notes)


def test_a_plan_of_hub_models_downloads_no_weights(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_frmerge.checkpoints.hub.folder._FIRST_BYTES", 1000)
    size, repos = 0, []
    for seed, name in enumerate(("e0", "e1")):
        folder = Path(write_model(tmp_path / name, random_model(seed)))
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        repos.append(hub.add_repo(f"ann/{name}", files | {"README.md": b"---\nlicense: mit\n---\n"}))
        size += len(files["model.safetensors"])
    args = MergingArguments(output_dir=str(tmp_path / "out"))
    with closing(build_plan(["ann/e0", "ann/e1@main"], args, download=False)) as plan:
        actual = plan.describe()
        assert (actual["n_merge"], actual["n_copy"]) == (len(SHAPES), 0)
        assert [expert["commit"] for expert in actual["experts"]] == [repo.branches["main"] for repo in repos]
        assert licences_of_plan(plan).licence == "mit"
    ranges = [request.headers["range"] for request in hub.sent("GET", r"model\.safetensors")]
    spans = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in ranges]
    assert 0 < sum(stop - start + 1 for start, stop in spans) < size / 10


def test_adapters_over_a_quantised_base_are_told_so(adapters: Path, tmp_path: Path, plan: Plan) -> None:
    base = tmp_path / "base"
    tensors = load_file(adapters / "base/model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    codes = {f"{name}.qweight": torch.ones(2, 16, dtype=torch.int32), f"{name}.scales": torch.ones(1, 16)}
    base.mkdir()
    save_file({k: v for k, v in tensors.items() if name not in k} | codes, base / "model.safetensors")
    (base / "config.json").write_bytes((adapters / "base/config.json").read_bytes())
    experts = [adapters / "a0", adapters / "a1"]
    with pytest.raises(CheckpointError, match=r"base' is quantised \(GPTQ or AWQ, by its tensors .*q_proj\.qweight\)"):
        plan(experts, base=base, adapter_output="merged")


def test_a_merged_adapter_brings_the_tokenizer_of_its_adapters(adapters: Path, tmp_path: Path, plan: Plan) -> None:
    experts = [Path(shutil.copytree(adapters / name, tmp_path / name)) for name in ("a0", "a1")]
    for expert in experts:
        save_tokenizer(expert, ["a", "b"], "{{ messages }}")
    with closing(plan(experts)) as planned:
        assert not any("left behind" in note for note in planned.notes)
        run_merge(planned, StepObserver(), Processes())
    files = read_manifest(tmp_path / "out").files
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (experts[0] / name).read_bytes()
        assert files[name].size == (experts[0] / name).stat().st_size
    assert verify(str(tmp_path / "out")).ok
