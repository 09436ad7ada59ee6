"""Stored outputs against float64 arithmetic on whole distributions: exact, and as sketches with their stated error."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.special import log_softmax

from hf_frmerge.errors import MergeError
from hf_frmerge.evaluation.measures.function_distance import (
    PAIR_COLUMNS,
    compare,
    distances,
    objective,
    pair_distances,
    summarise,
)
from hf_frmerge.evaluation.measures.token_tables import OutputFormat, TokenTable
from hf_frmerge.evaluation.models.predictions import predictions
from hf_frmerge.evaluation.record import MERGED, FunctionDistance
from hf_frmerge.geometry.simplex import barycentre, chord_to_distance, fisher_rao_distance

VOCAB, TOKENS, TOP_K = 500, 400, 32


def family(seed: int, apart: float, n: int = 3) -> list[torch.Tensor]:
    """Logits of `n` models, `(TOKENS, VOCAB)`: tokens from sure to clueless, models `apart` from a common one."""
    rng = np.random.default_rng(seed)
    sharpness = np.geomspace(0.5, 4.0, TOKENS)[:, None]
    common = rng.standard_normal((TOKENS, VOCAB))
    models = [sharpness * (common + apart * rng.standard_normal((TOKENS, VOCAB))) for _ in range(n)]
    return [torch.from_numpy(model).float() for model in models]


def store(path: Path, logits: torch.Tensor, stored_as: OutputFormat, chunk: int = TOKENS) -> TokenTable:
    table = TokenTable(path, len(logits), stored_as.columns).create().open(write=True)
    targets = torch.zeros(len(logits), dtype=torch.int64)
    for start in range(0, len(logits), chunk):
        for rows in predictions(logits[start : start + chunk], targets[start : start + chunk]):
            table.write("log_prob", start + rows.start, rows.log_prob)
            table.write("first", start + rows.start, rows.first)
            stored_as.write(table, start + rows.start, rows)
    return table


def divergences(tmp_path: Path, stored: torch.Tensor, live: torch.Tensor, top_k: int) -> TokenTable:
    stored_as = OutputFormat(VOCAB, top_k)
    table = store(tmp_path / "stored", stored, stored_as)
    result = TokenTable(tmp_path / f"pair{len(list(tmp_path.iterdir()))}", len(live), PAIR_COLUMNS)
    result.create().open(write=True)
    for rows in predictions(live, torch.zeros(len(live), dtype=torch.int64)):
        compare(result, rows.start, rows, table, stored_as)
    return result


def p_of(logits: torch.Tensor) -> np.ndarray:
    return np.exp(log_softmax(logits.double().numpy(), axis=-1))


@pytest.mark.parametrize("apart", [1.0, 0.1, 1e-3])
def test_whole_distributions_give_the_exact_distance(tmp_path: Path, apart: float) -> None:
    p, q = family(0, apart, 2)
    actual = pair_distances(divergences(tmp_path, p, q, top_k=0))
    exact = fisher_rao_distance(p_of(p), p_of(q))
    np.testing.assert_allclose(actual, exact, atol=1e-6)
    np.testing.assert_allclose(actual, exact, rtol=1e-6 / exact.min())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_measured_in_higher_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    p, q = (logits.to(dtype) for logits in family(0, 0.1, 2))
    actual = pair_distances(divergences(tmp_path, p, q, top_k=0))
    np.testing.assert_allclose(actual, fisher_rao_distance(p_of(p), p_of(q)), atol=1e-6)


def reference(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    middle = np.log(0.5 * (p + q))
    js = 0.5 * ((p * (np.log(p) - middle)).sum(-1) + (q * (np.log(q) - middle)).sum(-1))
    return {
        "kl_other_model": (p * np.log(p / q)).sum(-1).mean(),
        "kl_model_other": (q * np.log(q / p)).sum(-1).mean(),
        "jensen_shannon": js.mean(),
        "mean_squared": (fisher_rao_distance(p, q) ** 2).mean(),
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("apart", [0.5, 0.3, 0.03])
def test_a_sketch_is_as_close_as_it_says(tmp_path: Path, seed: int, apart: float) -> None:
    p, q = family(seed, apart, 2)
    actual: FunctionDistance = summarise("q", "p", "text", divergences(tmp_path, p, q, TOP_K))
    exact = fisher_rao_distance(p_of(p), p_of(q))
    assert 0 < actual.error < 0.03 * exact.mean()
    assert abs(actual.fisher_rao.mean - exact.mean()) < actual.error
    for name, value in reference(p_of(p), p_of(q)).items():
        assert getattr(actual, name) == pytest.approx(value, rel=0.1), name
    assert actual.top1_agreement == np.mean(p_of(p).argmax(-1) == p_of(q).argmax(-1))


@pytest.mark.parametrize("apart", [1.0, 0.3])
def test_every_token_lies_within_what_the_top_k_alone_allows(tmp_path: Path, apart: float) -> None:
    """Fisher-Rao distances shrink when the tail is lumped, and the unseen part cannot lower the affinity."""
    logits_p, logits_q = family(3, apart, 2)
    p, q = p_of(logits_p), p_of(logits_q)
    top = np.argsort(-p, axis=-1)[:, :TOP_K]
    seen_p, seen_q = np.take_along_axis(p, top, -1), np.take_along_axis(q, top, -1)
    affinity = np.sqrt(seen_p * seen_q).sum(-1)
    both = np.sqrt((1 - seen_p.sum(-1)) * (1 - seen_q.sum(-1)))
    lowest, highest = 2 * np.arccos(affinity + both), 2 * np.arccos(affinity)
    table = divergences(tmp_path, logits_p, logits_q, TOP_K)
    for actual in (fisher_rao_distance(p, q), distances(table, "chord_even"), distances(table, "chord_odd")):
        assert (actual > lowest - 1e-5).all() and (actual < highest + 1e-5).all()
    # Lumping alone is far off, else there would be no need to draw.
    exact = fisher_rao_distance(p, q).mean()
    assert abs(pair_distances(table).mean() - exact) < 0.2 * abs(lowest.mean() - exact)


def test_a_model_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    [p] = family(0, 1.0, 1)
    for top_k in (0, TOP_K):
        actual = summarise("p", "p", "text", divergences(tmp_path, p, p, top_k))
        assert actual.fisher_rao.max < 1e-6 and actual.error < 1e-8 and actual.top1_agreement == 1


def test_what_is_drawn_depends_on_the_place_in_the_text_alone(tmp_path: Path) -> None:
    [logits] = family(0, 1.0, 1)
    stored_as = OutputFormat(VOCAB, TOP_K)
    whole, pieces = store(tmp_path / "a", logits, stored_as), store(tmp_path / "b", logits, stored_as, chunk=7)
    np.testing.assert_array_equal(whole.read("ids"), pieces.read("ids"))
    p, ids = p_of(logits), whole.read("ids")
    np.testing.assert_array_equal(ids[:, :TOP_K], np.argsort(-p, axis=-1)[:, :TOP_K])
    assert all(not set(row[TOP_K:]) & set(row[:TOP_K]) for row in ids.tolist())
    np.testing.assert_allclose(whole.read("tail"), 1 - np.take_along_axis(p, ids[:, :TOP_K], -1).sum(-1), atol=1e-6)
    # A likely outcome of the tail is drawn as often as its share says, to within one draw a token.
    for row in (0, 100, 399):
        tail = p[row].copy()
        tail[ids[row, :TOP_K]] = 0
        expected = TOP_K * tail / tail.sum()
        counts = np.bincount(ids[row, TOP_K:], minlength=VOCAB)
        assert (np.abs(counts - expected) <= 1 + 1e-6).all()


@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_the_objective_of_stored_outputs(tmp_path: Path, top_k: int) -> None:
    merged, *experts = family(1, 0.4, 4)
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    logits = dict(zip(weights, experts))
    pairs = {}
    for index, (name, live) in enumerate([*logits.items(), (MERGED, merged)]):
        for other in list(weights)[:index]:
            (tmp_path / name / other).mkdir(parents=True)
            pairs[name, other] = divergences(tmp_path / name / other, logits[other], live, top_k)
    actual = objective("text", list(weights), weights, pairs)
    p, alpha = np.stack([p_of(model) for model in experts], axis=1), np.array(list(weights.values()))
    centre = barycentre(p, alpha)
    to_barycentre = fisher_rao_distance(p_of(merged), centre).mean()
    tolerance = 1e-6 if top_k == 0 else 0.02
    assert actual.value == pytest.approx(
        (fisher_rao_distance(p_of(merged)[:, None], p) ** 2 @ alpha).mean(), rel=tolerance
    )
    assert actual.lowest == pytest.approx((fisher_rao_distance(centre[:, None], p) ** 2 @ alpha).mean(), rel=tolerance)
    assert abs(actual.to_barycentre.mean - to_barycentre) <= (1e-6 if top_k == 0 else actual.error)
    assert actual.error < 0.03 * to_barycentre


def test_tables_are_safetensors_files(tmp_path: Path) -> None:
    [logits] = family(0, 1.0, 1)
    table = store(tmp_path / "a.safetensors", logits, OutputFormat(VOCAB, TOP_K))
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert set(file.keys()) == set(table.columns)
        for name in table.columns:
            np.testing.assert_array_equal(file.get_tensor(name), table.read(name))
    np.testing.assert_array_equal(table.read("ids", 3, 9), table.read("ids")[3:9])
    with pytest.raises(ValueError, match="damaged"):
        TokenTable(table.path, TOKENS - 1, table.columns).open()
    table.path.open("r+b").truncate(1000)
    with pytest.raises(MergeError, match="cut short"):
        table.read("ids")


def test_a_full_disk_is_told_in_a_sentence() -> None:
    table = TokenTable(Path("/dev/full"), 1, {"log_prob": ("F64", 1)})
    table._fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(MergeError, match=r"No room.*top_k"):
        table.write("log_prob", 0, np.zeros(1))


def test_distance_of_chords_is_a_quarter_turn_at_most_for_disjoint_supports() -> None:
    assert chord_to_distance(np.array([2.0 + 1e-12]))[0] == pytest.approx(np.pi)
