"""Prompts that experts write behind pieces of those they have, against draws without a cache in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_frmerge.calibration.prompts import self_written
from hf_frmerge.calibration.prompts.continued import continued_prompts
from hf_frmerge.calibration.prompts.read_prompts import Prompts
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.models.identity import key_of, model_identity
from tests.tiny_models import save_classifier_family, save_llama_family

WORDS = [f"w{number}" for number in range(40)]
LEADING = (1,)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    save_llama_family(root, WORDS, spread=0.3)
    save_classifier_family(root / "classifiers", WORDS, spread=0.3)
    for name in ("math", "code"):  # in bfloat16 predictions with and without a cache differ by thousandths
        AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32).save_pretrained(root / name)
    return root


def given(expert: int, lengths: tuple[int, ...] = (30, 5, 24), leading: tuple[int, ...] = LEADING) -> Prompts:
    rng = np.random.default_rng(expert)
    texts = [np.concatenate([np.array(leading, np.int64), rng.integers(3, 40, n)]) for n in lengths]
    return Prompts(expert, tuple(texts), "file", leading)


def go_on(family: Path, cache: Path, prompts: list[Prompts], **options: Any) -> tuple[Prompts, ...]:
    experts = [resolve(str(family / name)) for name in ("math", "code")]
    chosen: dict[str, Any] = {"n_samples": 5, "max_length": 40, "seed": 7, **options}
    return continued_prompts(prompts, experts, resolve(str(family / "base")), cache_dir=cache, **chosen)


def is_in(piece: list[int], text: list[int]) -> bool:
    return any(text[at : at + len(piece)] == piece for at in range(len(text)))


def test_an_expert_goes_on_with_pieces_of_its_own_prompts(family: Path, tmp_path: Path) -> None:
    prompts = [given(1)]  # the first expert has none
    (written,) = go_on(family, tmp_path, prompts)
    assert (written.expert, written.source, written.leading) == (1, "file", LEADING)
    assert [len(ids) for ids in written.token_ids] == [40] * 5
    model = AutoModelForCausalLM.from_pretrained(family / "code")
    long = [prompts[0].token_ids[place].tolist()[1:] for place in (0, 2)]  # of 16 tokens or more
    seed = int(key_of([7, [model_identity(resolve(str(family / "code")))]])[:16], 16)
    for number, row in enumerate(ids.tolist() for ids in written.token_ids):
        assert row[0] == 1 and is_in(row[1:17], long[number % 2])
        for place, u in enumerate(np.random.default_rng([seed, number, 23]).random(23), start=17):
            with torch.no_grad():
                logits = model(torch.tensor([row[:place]]), use_cache=False).logits[0, -1].double().numpy()
            below = np.cumsum(np.exp(logits) / np.exp(logits).sum())
            assert below[row[place]] - np.exp(logits[row[place]]) / np.exp(logits).sum() - 1e-5 < u
            assert u < below[row[place]] + 1e-5
    assert len({tuple(ids[:17]) for ids in written.token_ids}) > 2  # from several places


@pytest.mark.parametrize(("lengths", "max_length", "width"), [((6, 9, 3), 40, 9), ((30, 30), 21, 10), ((1, 1), 8, 1)])
def test_pieces_are_shorter_where_prompts_are(
    family: Path, tmp_path: Path, lengths: tuple[int, ...], max_length: int, width: int
) -> None:
    (own,) = prompts = [given(0, lengths)]
    (written,) = go_on(family, tmp_path, prompts, max_length=max_length)
    for ids in written.token_ids:
        row = ids.tolist()
        assert len(row) == max_length
        assert any(is_in(row[1 : 1 + width], text.tolist()[1:]) for text in own.token_ids)


def test_they_are_kept_under_everything_they_depend_on(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_written, "BATCH", 3)
    (first,) = go_on(family, tmp_path, [given(0)])
    n_files = len(list(tmp_path.iterdir()))
    assert n_files == 2
    with monkeypatch.context() as patched:
        patched.setattr("hf_frmerge.calibration.prompts.continued.go_on", None)  # must not be called
        assert go_on(family, tmp_path, [given(0)])[0].digest == first.digest
    (more,) = go_on(family, tmp_path, [given(0)], n_samples=6)
    assert [ids.tolist() for ids in more.token_ids[:5]] == [ids.tolist() for ids in first.token_ids]
    for other, options in (
        (given(1), {}),
        (given(0, (30, 5)), {}),
        (given(0), {"seed": 8}),
        (given(0), {"max_length": 39}),
    ):
        (written,) = go_on(family, tmp_path, [other], **options)
        assert written.digest != first.digest


def test_an_expert_that_writes_no_text_is_named(family: Path, tmp_path: Path) -> None:
    expert = resolve(str(family / "classifiers" / "math"))
    with pytest.raises(ArgumentError, match=r"The expert '.*classifiers/math' gives no prompts\."):
        continued_prompts([given(0)], [expert], None, n_samples=1, max_length=20, seed=0, cache_dir=tmp_path)
