"""Errors of hidden states behind every block, against the models run whole by transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import save_llama_family
from transformers import AutoModelForCausalLM

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORDS = ["alpha", "beta", "gamma", "delta", "house", "room", "door", "other"]
NAMES = ("math", "code")


@pytest.fixture
def layer_errors(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import layer_errors

    for module in ("layer_errors", "distil_control"):
        monkeypatch.delitem(sys.modules, module)
    return layer_errors


def hidden_states(folder: Path, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states `(tokens, H)` behind every block but the last, whose final norm transformers has applied."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(ids_BT, output_hidden_states=True).hidden_states
    return [state.flatten(0, 1) for state in states[1:-1]]


def test_errors_of_a_merge_without_data(
    tmp_path: Path, layer_errors: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama_family(tmp_path, WORDS, 0.3)
    given = []
    for number, name in enumerate(NAMES):
        drawn = torch.randint(len(WORDS), (12, 128), generator=torch.Generator().manual_seed(number))
        rows = [json.dumps({"text": " ".join(WORDS[int(i)] for i in row)}) + "\n" for row in drawn]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        given.append(f"{tmp_path / name}={tmp_path / name}.jsonl")
    options = ["--base", str(tmp_path / "base"), "--method", "linear", "--prompts", "12", "--calibration", *given]
    monkeypatch.setattr(sys, "argv", ["layer_errors", *options])
    sweep = layer_errors.begin_sweep(layer_errors.parse_args(), method="linear")
    load = AutoModelForCausalLM.from_pretrained
    experts = [load(tmp_path / name, dtype=torch.float32).state_dict() for name in NAMES]
    linear = load(tmp_path / "base", dtype=torch.float32)
    linear.load_state_dict({name: (values + experts[1][name]) / 2 for name, values in experts[0].items()})
    linear.save_pretrained(tmp_path / "linear")

    for index in range(len(sweep.state.model.blocks) - 1):
        sweep.fit_block(index)
        found = []
        for batch in sweep.state.batches:
            if batch.is_held_out:
                ids = batch.inputs["input_ids"]
                expert = hidden_states(tmp_path / NAMES[batch.expert], ids)[index]
                merged = hidden_states(tmp_path / "linear", ids)[index]
                found.append((merged - expert).norm(dim=1) / expert.norm(dim=1))
        without_data, fitted, held_out = layer_errors.errors(sweep)
        assert without_data == pytest.approx(float(torch.cat(found).median()), rel=0.03)  # in bfloat16
        assert 0 < fitted < without_data and held_out > 0
