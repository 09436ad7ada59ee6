"""What a refused calibration advises to do, done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.merging.record.manifest import read_manifest

FORBIDDEN = 59  # a token that only the test of prompts uses


def write_llama(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    return torch.randint(0, FORBIDDEN, (40, 8), generator=torch.Generator().manual_seed(0)).tolist()


def calibrate(experts: list[str], out: Path, texts: list[list[int]], **options: Any) -> None:
    args = MergingArguments(
        output_dir=str(out),
        method="linear",
        disable_tqdm=True,
        num_calibration_samples=16,
        max_calibration_length=8,
        **options,
    )
    FisherRaoMerger(experts, args, calibration_dataset=texts).merge()
    assert read_manifest(out).calibration is not None


def test_leave_out_stream_from_hub(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        folder = write_llama(tmp_path / f"e{number}", number)
        hub.add_repo(f"lab/e{number}", {path.name: path.read_bytes() for path in folder.iterdir()})
    experts = ["lab/e0", "lab/e1"]
    with pytest.raises(ArgumentError, match=r"lab/e0.* Leave out --stream-from-hub \(stream_from_hub\)"):
        calibrate(experts, tmp_path / "out", prompts(), stream_from_hub=True)
    calibrate(experts, tmp_path / "out", prompts())


def test_leave_out_the_prompts_that_cause_it(tmp_path: Path) -> None:
    """One feature only one token has; what the layer makes of it is beyond float32."""
    experts = []
    for number in range(2):
        file = write_llama(tmp_path / f"e{number}", number) / "model.safetensors"
        tensors = load_file(file)
        tensors["model.embed_tokens.weight"][:, 31] = 0
        tensors["model.embed_tokens.weight"][FORBIDDEN, 31] = 1
        tensors["model.layers.0.self_attn.o_proj.weight"][31] = 0
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"][:, 31] = 1e25
        save_file(tensors, file, metadata={"format": "pt"})
        experts.append(str(file.parent))
    cause = [[*row[:4], FORBIDDEN, *row[5:]] for row in prompts()]
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.down_proj: .* Leave out the prompts that cause it"):
        calibrate(experts, tmp_path / "out", cause + prompts())
    calibrate(experts, tmp_path / "out", prompts(), overwrite=True)


def test_transformers_reports_what_it_has_no_names_for_either(tmp_path: Path) -> None:
    """To save such a model would write new numbers in the place of those, so the advice depends on the report."""
    experts = []
    for number in range(2):
        file = write_llama(tmp_path / f"e{number}", number) / "model.safetensors"
        renamed = {name.replace("layernorm.weight", "layernorm.gamma"): t for name, t in load_file(file).items()}
        save_file(renamed, file, metadata={"format": "pt"})
        experts.append(str(file.parent))
    with pytest.raises(ArgumentError, match=r"input_layernorm\.weight.* if it reports none of these as missing"):
        calibrate(experts, tmp_path / "out", prompts())
    _, report = AutoModelForCausalLM.from_pretrained(experts[0], output_loading_info=True)
    names = ("input_layernorm", "post_attention_layernorm")
    assert set(report["missing_keys"]) == {f"model.layers.0.{name}.weight" for name in names}


@pytest.mark.parametrize("options", [{}, {"refine_steps": 2}])
def test_give_weight_to_an_expert_that_has_prompts(tmp_path: Path, options: dict[str, Any]) -> None:
    experts = [str(write_llama(tmp_path / f"e{number}", number)) for number in range(2)]
    args = MergingArguments(
        output_dir=str(tmp_path / "out"),
        method="linear",
        disable_tqdm=True,
        num_calibration_samples=16,
        max_calibration_length=8,
        **options,
    )

    def merge(weights: list[float]) -> None:
        FisherRaoMerger(experts, args, weights, calibration_dataset={experts[1]: prompts()}).merge()

    with pytest.raises(ArgumentError, match=r"There are prompts of .*e1 alone, of weight 0.* Give weight to an"):
        merge([1.0, 0.0])
    assert not (tmp_path / "out").exists()
    merge([1.0, 0.1])
    assert read_manifest(tmp_path / "out").calibration is not None
