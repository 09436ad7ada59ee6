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


@pytest.mark.slow
def test_a_sample_of_architectures_is_merged_and_loaded() -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), "--only", *SAMPLE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(SAMPLE)} classes of transformers" in run.stdout
    assert f": {len(SAMPLE)} right in" in run.stdout, run.stdout
