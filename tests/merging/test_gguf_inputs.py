"""GGUF files as inputs, against the models that were written into them and against transformers' reading of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf")
pytest.importorskip("transformers", minversion="5.20")

from gguf import GGML_QUANT_SIZES
from gguf_files import KINDS, Type, random_blocks, tensors_of, write_gguf

from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.comparison.cells import ready_cells
from hf_frmerge.comparison.comparison import MergeComparison
from hf_frmerge.errors import CheckpointError, MergeError
from hf_frmerge.evaluation.models.merged import whole_model
from hf_frmerge.extraction.extract_lora import ExtractOptions, extract_lora
from hf_frmerge.merger import FisherRaoMerger
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen2": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**SMALL, head_dim=16),
    "qwen3moe": transformers.Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, tie_word_embeddings=False
    ),
}
WIDE = transformers.LlamaConfig(**SMALL | {"hidden_size": 256, "intermediate_size": 512}, tie_word_embeddings=False)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 1000)


def make(seed: int, config: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def save(folder: Path, seed: int, architecture: str = "llama", kind: Any = Type.Q8_0, **options: Any) -> Any:
    """Write a model as `m.gguf` and return it; with `name`, under that name."""
    folder.mkdir(exist_ok=True)
    name, config = options.pop("name", "m.gguf"), options.pop("config", CONFIGS[architecture])
    model = make(seed, config)
    write_gguf(folder / name, architecture, config, tensors_of(model, architecture), kind, **options)
    return model


def as_read_by_transformers(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


def merge(experts: list[Path], out: Path, base: Path | None = None, **options: Any) -> Any:
    options = {"method": "linear", **options}
    plan = build_plan(
        list(map(str, experts)), MergingArguments(str(out), **options), None, str(base) if base else None
    )
    run_merge(plan, StepObserver(), Processes())
    return plan


def mean(*tensors: torch.Tensor) -> torch.Tensor:
    return (sum(tensor.double() for tensor in tensors) / len(tensors)).to(tensors[0].dtype)  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_models_come_out_as_they_were_written(tmp_path: Path, architecture: str) -> None:
    models = [save(tmp_path / name, seed, architecture, Type.F32) for seed, name in ((1, "a"), (2, "b"))]
    if architecture == "qwen3moe":  # transformers makes a config of the file that lacks the width of its experts
        for name in "ab":
            CONFIGS[architecture].save_pretrained(tmp_path / name)
            config = json.loads((tmp_path / name / "config.json").read_text())
            config["architectures"] = ["Qwen3MoeForCausalLM"]
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", space="weights")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(merged) is type(models[0]) and not info["missing_keys"] and not info["unexpected_keys"]
    first, second = (model.state_dict() for model in models)
    for name, tensor in merged.state_dict().items():
        wanted = mean(first[name], second[name])
        # One is added to the norms of Gemma, and taken off again, in float32.
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=5e-7 if "norm" in name else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_merged_as_what_transformers_makes_of_them(tmp_path: Path, kind: Any) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path / name, seed, kind=kind)
    out = tmp_path / "out"
    plan = merge([tmp_path / "a", tmp_path / "b" / "m.gguf"], out)
    dtype = {Type.F32: torch.float32, Type.F16: torch.float16}.get(kind, torch.bfloat16)
    first, second = (as_read_by_transformers(tmp_path / name, dtype) for name in "ab")
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == first.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, mean(first[name], second[name])), name
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and "quantization_config" not in config
    (note,) = [note for note in plan.notes if f"'{tmp_path}/a' is a GGUF file" in note]
    assert kind.name in note and "21 weights" in note and "The output is not quantised." in note
    accounts = json.loads((out / "merge_manifest.json").read_text())["report"]["accounts"]
    assert all(each["n_tensors"] == each["n_merged"] == 21 for each in accounts)
    assert verify(str(out)).ok and reproduce(str(out)).identical


def test_k_quants_of_several_kinds_in_one_file(tmp_path: Path) -> None:
    kinds = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]
    for seed, name in ((1, "a"), (2, "b")):
        plain = tensors_of(make(seed, WIDE), "llama")
        chosen = {each: kinds[place % len(kinds)] for place, each in enumerate(plain)}
        codes = {
            each: random_blocks(values.shape, chosen[each], seed) if values.ndim > 1 else values
            for each, values in plain.items()
        }
        (tmp_path / name).mkdir()
        write_gguf(tmp_path / name / "m.gguf", "llama", WIDE, codes, chosen.__getitem__)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    first, second = (as_read_by_transformers(tmp_path / name, torch.bfloat16) for name in "ab")
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, mean(first[name], second[name])), name


def test_a_file_beside_full_models_and_as_their_base(tmp_path: Path) -> None:
    save(tmp_path / "base", 0)
    base = as_read_by_transformers(tmp_path / "base", torch.bfloat16)
    models = [make(seed, CONFIGS["llama"]).to(torch.bfloat16) for seed in (1, 2)]
    for name, model in zip("ab", models):
        model.save_pretrained(tmp_path / name)
    experts = [tmp_path / "a", tmp_path / "b"]
    merge([tmp_path / "a", tmp_path / "base"], tmp_path / "mixed")
    options = {"method": "task_arithmetic", "space": "deltas", "scale": 0.5, "dtype": "float32"}
    merge(experts, tmp_path / "deltas", tmp_path / "base/m.gguf", **options)
    mixed, deltas = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "deltas"))
    for name, origin in base.items():
        tuned = [model.state_dict()[name] for model in models]
        assert torch.equal(mixed[name], mean(tuned[0], origin)), name
        wanted = origin.double() + 0.5 * sum(each.double() - origin.double() for each in tuned)
        torch.testing.assert_close(deltas[name], wanted.float())
    assert verify(str(tmp_path / "deltas")).ok


def test_adapters_over_a_file(tmp_path: Path) -> None:
    save(tmp_path / "base", 0)
    base = make(0, CONFIGS["llama"])
    base.load_state_dict(as_read_by_transformers(tmp_path / "base", torch.bfloat16))
    base.to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    for seed, name in ((1, "x"), (2, "y")):
        torch.manual_seed(seed)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "plain"),
            LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        )
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(tmp_path / name)
    experts = [tmp_path / "x", tmp_path / "y"]
    merge(experts, tmp_path / "out", tmp_path / "base", adapter_output="merged", dtype="float32")
    plan = merge(experts, tmp_path / "adapter", tmp_path / "base", adapter_output="adapter")
    assert any("which PEFT cannot load by its name, as it is a GGUF file" in note for note in plan.notes)
    assert verify(str(tmp_path / "adapter")).ok
    folded = []
    for name in "xy":
        origin = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
        folded.append(PeftModel.from_pretrained(origin, tmp_path / name).merge_and_unload().state_dict())
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        torch.testing.assert_close(tensor, mean(folded[0][name], folded[1][name]), rtol=0, atol=1e-6)


def test_an_adapter_is_extracted(tmp_path: Path) -> None:
    for seed, name in ((0, "base"), (1, "tuned")):
        save(tmp_path / name, seed)
    opened = [open_checkpoint(resolve(str(tmp_path / name))) for name in ("tuned", "base")]
    with opened[0], opened[1]:
        extract_lora(*opened, tmp_path / "lora", ExtractOptions(rank=64, target_modules=["q_proj"]))
    module = "model.layers.0.self_attn.q_proj"
    factors = load_file(tmp_path / "lora/adapter_model.safetensors")
    up, down = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "BA")
    tuned, base = (as_read_by_transformers(tmp_path / name, torch.bfloat16) for name in ("tuned", "base"))
    delta = tuned[f"{module}.weight"].double() - base[f"{module}.weight"].double()
    assert (up @ down - delta).norm() < 0.01 * delta.norm()


def with_tokenizer(writer: Any) -> None:
    tokens = ["<s>", "</s>", *map(chr, range(97, 123)), "Ġ", "ab", "cd", "abcd", "he", "ll", "Ġhe", *"!?,.-"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["a b", "c d", "ab cd", "h e", "l l", "Ġ he"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages[0].content }}!")


def test_the_output_has_the_tokenizer_of_the_file(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path / name, seed, "qwen2", settings=with_tokenizer)
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    wanted = AutoTokenizer.from_pretrained(tmp_path / "a", gguf_file="m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "abcd he hello!"
    assert tokenizer(text).input_ids == wanted(text).input_ids
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hello!"
    assert not any("tokenizer" in note for note in plan.notes)
    assert verify(str(tmp_path / "out")).ok


def test_a_file_without_a_tokenizer_can_take_that_of_another_model(tmp_path: Path) -> None:
    save(tmp_path / "a", 1, "qwen2")
    save(tmp_path / "b", 2, "qwen2", settings=with_tokenizer)
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert any("a/m.gguf' holds no tokenizer" in note for note in plan.notes)
    assert any(f"that of '{tmp_path}/b' is taken" in note for note in plan.notes)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "chosen", settings_from=str(tmp_path / "b"))
    wanted = AutoTokenizer.from_pretrained(tmp_path / "b", gguf_file="m.gguf")("he abcd").input_ids
    for name in ("out", "chosen"):
        assert AutoTokenizer.from_pretrained(tmp_path / name)("he abcd").input_ids == wanted


def test_files_beside_go_before_those_that_are_made(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path / name, seed, "qwen2", settings=with_tokenizer)
        config = CONFIGS["qwen2"].to_dict() | {"architectures": ["Qwen2ForCausalLM"], "dtype": "float16"}
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.125}))
    (tmp_path / "a/tokenizer_config.json").write_text('{"model_max_length": 77}')
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["attention_dropout"] == 0.125 and written["dtype"] == "float16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"model_max_length": 77}
    assert not (tmp_path / "out/tokenizer.json").exists()


def with_scaled_positions(writer: Any) -> None:
    writer.add_rope_scaling_type(pytest.importorskip("gguf").RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


def test_it_is_said_that_the_scaling_of_positions_is_lost(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        (tmp_path / name).mkdir()
        tensors = tensors_of(make(seed, CONFIGS["llama"]), "llama") | {"rope_freqs.weight": np.ones(8, np.float32)}
        write_gguf(tmp_path / name / "m.gguf", "llama", CONFIGS["llama"], tensors, settings=with_scaled_positions)
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    notes = [note for note in plan.notes if "how positions are scaled" in note]
    assert len(notes) == 2 and "llama.rope.scaling.factor" in notes[0] and "rope_freqs.weight" in notes[0]
    account = json.loads((tmp_path / "out/merge_manifest.json").read_text())["report"]["accounts"][0]
    assert account["n_tensors"] == 22 and sum(account["unused"].values()) == 1
    CONFIGS["llama"].save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    shutil.copy(tmp_path / "a/config.json", tmp_path / "b")
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "with-config")
    assert not any("positions" in note for note in plan.notes)


def test_an_output_layer_that_the_config_ties(tmp_path: Path) -> None:
    """GPT-2 and others are stored with both; where these differ, the output unties them."""
    models = []
    for seed, name in ((1, "a"), (2, "b")):
        (tmp_path / name).mkdir()
        model = make(seed, CONFIGS["qwen2"])
        output = np.random.default_rng(seed).normal(size=(40, 64)).astype(np.float32)
        models.append(model.state_dict() | {"lm_head.weight": torch.from_numpy(output)})
        tensors = {"output.weight": output} | tensors_of(model, "qwen2")
        write_gguf(tmp_path / name / "m.gguf", "qwen2", CONFIGS["qwen2"], tensors)
        config = CONFIGS["qwen2"].to_dict() | {"architectures": ["Qwen2ForCausalLM"]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name], mean(*(model[name] for model in models)))


def split(folder: Path, seed: int) -> None:
    """Write a model into two files, as llama.cpp's tool does: all settings are in the first."""
    folder.mkdir()
    tensors = list(tensors_of(make(seed, CONFIGS["llama"]), "llama").items())
    for number, part in enumerate((tensors[:4], tensors[4:]), 1):
        path = folder / f"m-{number:05d}-of-00002.gguf"
        write_gguf(path, "llama", CONFIGS["llama"], dict(part), Type.Q8_0)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        split(tmp_path / name, seed)
        save(tmp_path / f"whole-{name}", seed)
    merge([tmp_path / "a", tmp_path / "b/m-00002-of-00002.gguf"], tmp_path / "out")
    merge([tmp_path / "whole-a", tmp_path / "whole-b"], tmp_path / "whole")
    merged, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert verify(str(tmp_path / "out")).ok
    (tmp_path / "b/m-00001-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"is a model in 2 files, and 'm-00001-of-00002\.gguf' is not"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "again")


def test_a_file_that_is_a_link_is_found_again(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path / name, seed)
        (tmp_path / name / "m.gguf").rename(tmp_path / f"blob-{name}")
        (tmp_path / name / "m.gguf").symlink_to(tmp_path / f"blob-{name}")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert verify(str(tmp_path / "out")).ok


def test_a_file_that_was_written_anew_is_another_model(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path / name, seed)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    save(tmp_path / "a", 3)
    report = verify(str(tmp_path / "out"))
    assert not report.ok and any("q_proj" in problem for problem in report.problems)
    plan = build_plan([str(tmp_path / name) for name in "ab"], MergingArguments(str(tmp_path / "other")), None, None)
    os.utime(tmp_path / "b/m.gguf", (1, 1))
    with pytest.raises(CheckpointError, match=r"b/m\.gguf changed while it was in use"):
        run_merge(plan, StepObserver(), Processes())


def test_an_interrupted_merge_goes_on(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path / name, seed)
    experts = [tmp_path / "a", tmp_path / "b"]
    merge(experts, tmp_path / "whole")

    class Interrupting(StepObserver):
        def begin(self, step: Any) -> bool:
            if "layers.1" in step.name:
                raise KeyboardInterrupt
            return True

    plan = build_plan(list(map(str, experts)), MergingArguments(str(tmp_path / "out"), method="linear"), None, None)
    with pytest.raises(KeyboardInterrupt):
        run_merge(plan, Interrupting(), Processes())
    merge(experts, tmp_path / "out", resume_from_checkpoint=True)
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed


def test_rows_are_read_without_the_whole_tensor(tmp_path: Path) -> None:
    """Only what transformers turns is computed as a whole; the embedding, the largest tensor, is not."""
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2)
    plan = build_plan([str(tmp_path / name) for name in "ab"], MergingArguments(str(tmp_path / "out")), None, None)
    weights = plan.experts[0].weights
    turned = 64 * 64  # q_proj
    assert weights.largest_computed == 16 * turned
    reads: list[int] = []
    view = weights.folder.view

    def counting(name: str, size: int, start: int, stop: int) -> Any:
        reads.append(stop - start)
        return view(name, size, start, stop)

    weights.folder.view = counting  # type: ignore[method-assign, union-attr]
    weights.read("model.embed_tokens.weight", 130, 390)
    row = 64 // 32 * 34
    assert reads == [3 * row]  # bytes 130 to 390 are in rows 1 to 3 of 128 bytes
    plan.close()


def refusal(experts: list[Path], out: Path, **options: Any) -> str:
    with pytest.raises(MergeError) as refused:
        merge(experts, out, **options)
    assert not out.exists()
    return str(refused.value)


def test_files_of_others_in_the_same_folder_are_not_carried(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path, seed, name=f"{name}.gguf")
    (tmp_path / "notes.txt").write_text("private")
    (tmp_path / "photos").mkdir()
    plan = merge([tmp_path / "a.gguf", tmp_path / "b.gguf"], tmp_path / "out")
    assert not (tmp_path / "out/notes.txt").exists() and not any("photos" in note for note in plan.notes)
    assert verify(str(tmp_path / "out")).ok


def test_the_folder_of_a_file_is_no_output_folder(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path / name, seed)
    with pytest.raises(MergeError, match="is also an input"):
        merge([tmp_path / "a/m.gguf", tmp_path / "b"], tmp_path / "a", overwrite=True)


def test_several_models_in_one_folder(tmp_path: Path) -> None:
    save(tmp_path / "a", 1, name="q8.gguf")
    save(tmp_path / "a", 1, name="q4.gguf", kind=Type.Q4_0)
    save(tmp_path / "b", 2)
    said = refusal([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert "holds 2 GGUF files that may each be a model. Pass the one you mean" in said
    assert f"'{tmp_path}/a/q4.gguf' or '{tmp_path}/a/q8.gguf'" in said
    merge([tmp_path / "a/q4.gguf", tmp_path / "b"], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.pop("blk.1.attn_v.weight"),
            "the file holds no tensor for model.layers.1.self_attn.v_proj.weight",
        ),
        (
            lambda t: t.update({"blk.0.attn_q.bias": np.ones(64, np.float32)}),
            r"the model has no weight for the tensor 'blk\.0\.attn_q\.bias'",
        ),
        (
            lambda t: t.update({"token_embd.weight": np.ones((41, 64), np.float32)}),
            r"embed_tokens\.weight has the shape \[40, 64\], the file holds token_embd\.weight \[41, 64\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path: Path, change: Any, sentence: str) -> None:
    (tmp_path / "a").mkdir()
    tensors = tensors_of(make(1, CONFIGS["llama"]), "llama")
    change(tensors)
    write_gguf(tmp_path / "a/m.gguf", "llama", CONFIGS["llama"], tensors)
    save(tmp_path / "b", 2)
    with pytest.raises(CheckpointError, match=sentence):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_architectures_without_tables(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    write_gguf(tmp_path / "b/m.gguf", "rwkv6", CONFIGS["llama"], tensors_of(make(2, CONFIGS["llama"]), "llama"))
    said = refusal([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert "of the architecture 'rwkv6', and the installed transformers has no tables" in said
    # A config of another kind does not make it one.
    config = CONFIGS["llama"].to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    assert refusal([tmp_path / "a", tmp_path / "b"], tmp_path / "out") == said


def test_codes_that_the_package_does_not_dequantise(tmp_path: Path) -> None:
    plain = tensors_of(make(1, CONFIGS["llama"]), "llama")
    per_block, size = GGML_QUANT_SIZES[Type.Q8_1]
    codes = {
        name: np.zeros((*v.shape[:-1], v.shape[-1] // per_block * size), np.uint8) if v.ndim > 1 else v
        for name, v in plain.items()
    }
    (tmp_path / "a").mkdir()
    write_gguf(tmp_path / "a/m.gguf", "llama", CONFIGS["llama"], codes, Type.Q8_1)
    save(tmp_path / "b", 2)
    assert "tensors of type Q8_1, which the gguf package does not" in refusal(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "out"
    )


def test_what_runs_models_refuses_files_before_it_merges(tmp_path: Path) -> None:
    for seed, name in ((1, "a"), (2, "b")):
        save(tmp_path / name, seed, "qwen2", settings=with_tokenizer)
    experts, out = [str(tmp_path / name) for name in "ab"], str(tmp_path / "out")
    rows = [{"text": "hello abcd"}]
    calibrated = FisherRaoMerger(experts, MergingArguments(out), calibration_dataset=dict.fromkeys(experts, rows))
    evaluated = FisherRaoMerger(experts, MergingArguments(out, do_eval=True), eval_dataset=rows)
    for merger, why in (
        (calibrated, "A calibrated merge runs its models"),
        (evaluated, "The experts would be evaluated"),
    ):
        with pytest.raises(MergeError, match=f"{why}.*a' is a GGUF file. Let transformers dequantise it once"):
            merger.merge()
        assert not (tmp_path / "out/config.json").exists()
    compared = MergeComparison(experts, {"text": rows}, args=MergingArguments(str(tmp_path / "cells")))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for run in (
        compared.run,
        lambda: ready_cells(experts[:1], "Qwen2ForCausalLM"),
        lambda: whole_model(str(adapter), experts[0]),
    ):
        with pytest.raises(CheckpointError, match=r"An evaluation runs its models, and .*a' is a GGUF file"):
            run()
    with pytest.raises(CheckpointError, match=r"An evaluation runs its models, and .*a' is a GGUF file"):
        evaluated.evaluate_experts()
