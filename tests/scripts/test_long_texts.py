"""Texts that no expert saw, found among what experts were trained on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.tiny_models import word_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def long_texts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    import long_texts

    own = ("bench_function_space", "expert_texts", "expert_training", "merge_facts", "small_models", "train_experts")
    for module in ("long_texts", *own):
        monkeypatch.delitem(sys.modules, module)
    return long_texts


@pytest.mark.parametrize("words_a_document", [3, 10, 47])
def test_untouched_documents_are_those_without_a_word_in_training(
    long_texts: ModuleType, words_a_document: int
) -> None:
    documents = [" ".join([f"w{number}"] * words_a_document) for number in range(60)]
    tokenizer = word_tokenizer([f"w{number}" for number in range(60)])
    recipe = long_texts.Recipe(("one",), steps=3, warm_up=1, learning_rate=1.0, batch_size=2, length=5)
    found = long_texts.untouched(documents, tokenizer, recipe, seed=7)

    words = long_texts.training_text(documents).split()
    drawn = long_texts.drawn_blocks(len(words) // 5, recipe, 7).tolist()
    seen = {word for block in drawn for word in words[5 * block : 5 * block + 5]}
    assert len(drawn) == 6
    assert found == [document for document in documents if document.split()[0] not in seen]


def test_a_lead_is_the_difference_of_what_is_kept(long_texts: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = np.random.default_rng(0)
    base, expert = ({"a": drawn.normal(mean, 0.1, (50, 8)), "b": drawn.normal(mean, 0.1, (50, 8))} for mean in (3, 2))
    first, second = ({name: drawn.normal(2.5, 0.1, (50, 8)) for name in base} for _ in range(2))
    long_texts.print_table({"first": 1.0, "second": 1.4}, base, expert, {"first": first, "second": second})
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(("| first", "| sec"))]
    means = [100 * np.mean([(base[n] - of[n]).mean() / (base[n] - expert[n]).mean() for n in base])
             for of in (first, second)]  # fmt: skip
    assert [row[-3].split("±")[0].strip() for row in rows] == [f"{mean:.1f}" for mean in means]
    assert float(rows[1][-2].split("±")[0]) == pytest.approx(means[0] - means[1], abs=0.06)
