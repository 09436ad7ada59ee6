"""What a config cannot be built from is a sentence, whatever transformers raises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config

from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.errors import CheckpointError

SMALL = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
CONFIG = {**SMALL.to_dict(), "architectures": ["LlamaForCausalLM"]}
WRONG = [{"hidden_size": "eight"}, {"num_attention_heads": 0}, {"hidden_act": "none"}]
try:
    LlamaConfig(tie_word_embeddings=1)
except Exception:  # later versions look at the types
    WRONG.append({"tie_word_embeddings": 1})


@pytest.mark.parametrize("changes", WRONG)
def test_a_config_that_makes_no_model_is_refused_by_name(changes: dict[str, object]) -> None:
    assert build_empty(CONFIG, "org/model").config.hidden_size == 8
    with pytest.raises(CheckpointError, match=r"^'org/model': LlamaForCausalLM cannot be built from its config\.json"):
        build_empty(CONFIG | changes, "org/model")


def test_infinities_are_read_as_transformers_writes_them(tmp_path: Path) -> None:
    config = Mamba2Config(
        vocab_size=8, hidden_size=16, num_heads=4, head_dim=8, state_size=4, num_hidden_layers=1, n_groups=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["time_step_limit"] != config.time_step_limit
    assert build_empty(written, "org/model").config.time_step_limit[1] == math.inf
