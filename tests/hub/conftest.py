from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))  # for card_examples

from card_examples import full

from hf_frmerge.evaluation.record import EvaluationRecord, Score, save_record
from hf_frmerge.hub.card import write_card


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """Folder as a finished merge leaves it."""
    folder = tmp_path / "reader-135m"
    folder.mkdir()
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"model.embed_tokens.weight": weights}, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"model.embed_tokens.weight": np.ones((1, 3))}, folder / "merge_coefficients.safetensors")
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    manifest = {"experts": [{"spec": str(tmp_path / "experts" / "math"), "weight": 1.0}], "files": {}}
    (folder / "merge_manifest.json").write_text(json.dumps(manifest))
    save_record(folder, EvaluationRecord(scores=[Score("merged", "sums", {"loss": 1.0})]))
    write_card(full(), folder)
    return folder
