"""What a config cannot be built from is a sentence, whatever transformers raises."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.errors import CheckpointError

SMALL = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
CONFIG = {**SMALL.to_dict(), "architectures": ["LlamaForCausalLM"]}
WRONG = [{"tie_word_embeddings": 1}, {"hidden_size": "eight"}, {"num_attention_heads": 0}, {"hidden_act": "none"}]


@pytest.mark.parametrize("changes", WRONG)
def test_a_config_that_makes_no_model_is_refused_by_name(changes: dict[str, object]) -> None:
    assert build_empty(CONFIG, "org/model").config.hidden_size == 8
    with pytest.raises(CheckpointError, match=r"^'org/model': LlamaForCausalLM cannot be built from its config\.json"):
        build_empty(CONFIG | changes, "org/model")
