from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "test_architectures.py"
# Tied and untied, fused on load, renamed on load, encoder and decoder, images, and speech.
SAMPLE = (
    "BertForMaskedLM",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "MixtralForCausalLM",
    "T5ForConditionalGeneration",
    "T5Gemma2ForTokenClassification",  # ties two tensors of one name, and stores one of them
    "ViTForImageClassification",
    "WhisperForConditionalGeneration",
)


# Conv1D, stacks of experts beside which attention is adapted, factors of stacks that PEFT makes of it beside copies of
# an output layer, copies of one with a bias, renamed on load, encoder and decoder, images.
SAMPLE_OF_ADAPTERS = (
    "BertForMaskedLM",
    "DeepseekV3ForCausalLM",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "MixtralForCausalLM",
    "PhiForCausalLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
)


@pytest.mark.slow
@pytest.mark.parametrize(("options", "sample"), [([], SAMPLE), (["--adapters"], SAMPLE_OF_ADAPTERS)])
def test_a_sample_of_architectures_is_merged_and_loaded(options: list[str], sample: tuple[str, ...]) -> None:
    command = [sys.executable, str(SCRIPT), *options, "--only", *sample]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(sample)} classes of transformers" in run.stdout
    assert f": {len(sample)} right in" in run.stdout, run.stdout
