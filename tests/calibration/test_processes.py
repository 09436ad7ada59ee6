"""Two real processes that share the prompts find what one finds, but for the order in which float32 is summed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.provenance.verify import verify
from tests.calibration.two_process_fits import FITS, N_EXPERTS, TABLES, VOCABULARY, fit
from tests.tiny_models import word_tokenizer

SCRIPT = Path(__file__).with_name("two_process_fits.py")


def write_family(root: Path) -> None:
    """A base and its fine-tunes, of which weights, biases and norms differ; and the same of a mixture of experts."""
    words = word_tokenizer([f"w{number}" for number in range(VOCABULARY)], eos_token="<|endoftext|>")
    sizes: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    dense = Qwen2Config(**sizes, initializer_range=0.1)
    mixture = MixtralConfig(**sizes, initializer_range=0.3, num_local_experts=3, num_experts_per_tok=2)
    for family, model_class, config in (
        ("dense", Qwen2ForCausalLM, dense),
        ("mixture", MixtralForCausalLM, mixture),
    ):
        for number, name in enumerate(["base", *(f"e{expert}" for expert in range(N_EXPERTS))]):
            torch.manual_seed(0)
            model = model_class(config)
            generator = torch.Generator().manual_seed(number)
            for parameter in model.parameters():
                parameter.data += 0.1 * bool(number) * torch.randn(parameter.shape, generator=generator)
            model.save_pretrained(root / family / name)
            words.save_pretrained(root / family / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, below `two`; what they saw, in a file for each; and what one wrote, below `one`."""
    root = tmp_path_factory.mktemp("runs")
    write_family(root)
    here = Path(__file__).parents[2]  # this checkout, whatever is installed
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own_cache = {"HF_FRMERGE_CACHE": str(root / "cache"), "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(here)}
    command += [str(SCRIPT), str(root)]
    done = subprocess.run(
        command, env=os.environ | own_cache, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, options in (FITS | TABLES).items():
        fit(root, root / "one" / name, **options)
    return root


@pytest.mark.parametrize("name", FITS)
def test_two_processes_find_what_one_finds(runs: Path, name: str) -> None:
    one, two = (load_file(runs / count / name / "merge_corrections.safetensors") for count in ("one", "two"))
    fits_norms = not name.startswith(("regmean", "mats"))
    assert one.keys() == two.keys() and any("norm" in tensor for tensor in one) == fits_norms
    for tensor, values in one.items():
        assert float((two[tensor] - values).norm()) < 1e-4 * float(values.norm()), tensor
    alone, shared = (load_file(runs / count / name / "model.safetensors") for count in ("one", "two"))
    for tensor, values in alone.items():  # each of the two has written some
        assert float((shared[tensor] - values).norm()) < 1e-4 * float(values.norm()), tensor
    records: list[Any] = [read_manifest(runs / count / name).calibration for count in ("one", "two")]
    assert records[0].digest == records[1].digest and records[0].held_out == records[1].held_out
    for form, distances in records[0].distances.items():
        known = [[value for value in own if value is not None] for own in (records[1].distances[form], distances)]
        assert known[0] == pytest.approx(known[1], rel=1e-3), form
    assert verify(str(runs / "two" / name)).ok


@pytest.mark.parametrize("name", TABLES)
def test_two_processes_find_the_coefficients_that_one_finds(runs: Path, name: str) -> None:
    for file in ("merge_coefficients.safetensors", "model.safetensors"):
        alone, shared = (load_file(runs / count / name / file) for count in ("one", "two"))
        for tensor, values in alone.items():
            assert float((shared[tensor] - values).norm()) < 1e-4 * float(values.norm()), tensor
    record: Any = read_manifest(runs / "two" / name).calibration
    assert record.form == "table" and verify(str(runs / "two" / name)).ok
    assert record.fisher == TABLES[name].get("fisher")


def test_processes_hold_the_weights_of_their_own_experts(runs: Path) -> None:
    held = [json.loads((runs / f"rank{rank}.json").read_text())["held"] for rank in range(2)]
    assert held == [[[0, 2]], [[1]]]


def test_an_interrupted_fit_goes_on_to_the_same_bits(runs: Path) -> None:
    for rank in range(2):
        assert len(json.loads((runs / f"rank{rank}.json").read_text())["held"]) == 1  # the other block was kept
    for file in ("model.safetensors", "merge_corrections.safetensors"):
        assert (runs / "two" / "resumed" / file).read_bytes() == (runs / "two" / "fit" / file).read_bytes()


def test_an_error_of_one_process_is_told_by_all(runs: Path) -> None:
    errors = [json.loads((runs / f"rank{rank}.json").read_text())["error"] for rank in range(2)]
    assert errors == ["Process 1 of 2 failed: as in a bad prompt", "as in a bad prompt"]
