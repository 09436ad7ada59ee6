"""Columns of the benchmark that come from `frmerge evaluate`: against the record of an evaluation of a tiny merge."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny_models import save_llama_family
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORDS = ["alpha", "beta", "gamma", "delta", "house", "room", "door", "other"]
BLOCK = 16


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import merge_facts

    monkeypatch.delitem(sys.modules, "merge_facts")
    return merge_facts


def log_probabilities(folder: Path, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `(tokens, V)` of a model on blocks of a text, in float64, and the tokens that follow."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(file.read_text())["input_ids"])
    ids = ids.unfold(0, BLOCK, BLOCK - 1)  # blocks overlap by a token, so that each but the first is predicted once
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return torch.log_softmax(logits, dim=-1).flatten(0, 1), ids[:, 1:].flatten()


def test_facts_are_those_of_the_models_predictions(tmp_path: Path, facts: ModuleType) -> None:
    save_llama_family(tmp_path, WORDS, 0.3)
    names, files = ("math", "code"), {}
    for number, name in enumerate((*names, facts.NEUTRAL)):
        drawn = torch.randint(len(WORDS), (6 * (BLOCK - 1) + 1,), generator=torch.Generator().manual_seed(number))
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text(" ".join(WORDS[int(i)] for i in drawn))
    merged = tmp_path / "math"  # any model of the family will do: here it is at no distance to one of the experts
    texts = facts.Texts(files, [tmp_path / name for name in names], str(tmp_path / "base"), BLOCK)
    found = texts.measure(merged)

    squares = []
    for name in names:
        (p, _), (q, _) = (log_probabilities(folder, files[name]) for folder in (tmp_path / name, merged))
        cosine = (0.5 * (p + q)).exp().sum(-1).clamp(max=1)
        squares.append(float((2 * torch.arccos(cosine)).square().mean()))
    assert found.distance == pytest.approx(np.mean(squares), rel=0.02)
    losses = []
    for folder in (merged, tmp_path / "base"):
        log_p, following = log_probabilities(folder, files[facts.NEUTRAL])
        losses.append(-float(log_p.gather(1, following[:, None]).mean()))
    assert found.neutral == pytest.approx(losses[0] - losses[1], abs=0.01)  # one in bfloat16
    assert 0 < found.to_barycentre < 1 and 0 < found.variance < 2
    assert len(found.cells().split("|")) == len(facts.HEADINGS)
