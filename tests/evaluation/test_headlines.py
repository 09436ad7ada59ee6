from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from evaluation_records import make_record
from manifests import make_geometry, make_manifest

from hf_frmerge.evaluation.headlines import by_key, headlines, norm_headline
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, Generation, LayerActivations, Recovered, Score
from hf_frmerge.merging.record.manifest_entries import RecordedTensor


def test_headlines_are_the_worst_of_what_was_measured() -> None:
    # The record: layer 4 has 0.6 of the experts' rank; code recovers least; expert-code is the farther one.
    actual = by_key(headlines(make_record()), "eval")
    assert {key: (h.value, h.place) for key, h in actual.items() if h.domain is None} == {
        "eval_recovery_expert-math": (0.7, "on math"),
        "eval_recovery_expert-code": (0.5, "on code"),
        "eval_recovery": (0.5, "expert-code on code"),
        "eval_effective_rank": (pytest.approx(0.6), "layer 4"),
        "eval_activation_variance": (pytest.approx(0.6), "layer 4"),
        "eval_repetition": (0.1, "continuing math"),
        "eval_entropy": (1.5, "continuing math"),
    }
    assert (actual["eval_math_loss"].value, actual["eval_code_loss"].value) == (2.3, 2.0)
    assert (actual["eval_code_fisher_rao"].value, actual["eval_code_fisher_rao"].place) == (
        0.5,
        "code, to expert-code",
    )
    assert (actual["eval_math_objective"].value, actual["eval_math_to_barycentre"].value) == (0.25, 0.2)
    assert list(by_key(headlines(make_record()), name_domains=False))[:3] == ["loss", "perplexity", "token_accuracy"]


def test_what_is_no_number_is_the_worst() -> None:
    record = EvaluationRecord(
        models={"a": "expert", MERGED: "merged"},
        scores=[Score(MERGED, "x", {"perplexity": None})],  # type: ignore[dict-item]  # infinite, from a file
        recovery=[Recovered(MERGED, "a", "x", -1.0, 0.0, None)],
        layers=[
            LayerActivations(model, layer, variance, rank)
            for model, layer, variance, rank in [("a", 0, 0.0, 1.0), (MERGED, 0, 1.0, 1.0), ("a", 1, 2.0, 9.0),
                                                 (MERGED, 1, 1.0, 3.0)]
        ],
    )  # fmt: skip
    actual = by_key(headlines(record))
    assert math.isnan(actual["activation_variance"].value) and actual["activation_variance"].place == "layer 0"
    assert actual["effective_rank"].value == pytest.approx(1 / 3)
    assert math.isnan(actual["x_perplexity"].value)
    assert "recovery" not in actual, "an expert that gained nothing has nothing to recover"


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_no_number_is_the_worst_wherever_it_stands(broken: int) -> None:
    values = [0.3, 0.3, 0.3]
    values[broken] = math.nan
    record = make_record(
        distances=[],
        generations=[Generation(MERGED, f"d{i}", "p", "t", value, value) for i, value in enumerate(values)],
    )
    record.layers = [
        LayerActivations(model, layer, 1.0, math.nan if model == MERGED and layer == broken else 1.0)
        for model in (MERGED, "expert-math")
        for layer in range(3)
    ]
    actual = by_key(headlines(record))
    assert {name: actual[name].place for name in ("repetition", "entropy", "effective_rank")} == {
        "repetition": f"continuing d{broken}",  # of which the largest is the worst
        "entropy": f"continuing d{broken}",  # and of this the smallest
        "effective_rank": f"layer {broken}",
    }


def test_the_norm_is_that_of_the_worst_tensor_of_the_manifest(tmp_path: Path) -> None:
    def tensor(ratio: float, *norms: float) -> RecordedTensor:
        return RecordedTensor(
            "merge", "F32", (2,), {}, "", n_blocks=1, geometry=make_geometry(norm_ratio=ratio, norms=norms)
        )

    copied = RecordedTensor("copy", "F32", (2,), {}, "", donor=0)
    tensors = {"a": tensor(0.9, 1, 2), "b": tensor(0.7, 1, 2), "zero": tensor(0.5, 0, 0), "c": copied}
    (tmp_path / "merge_manifest.json").write_text(json.dumps(make_manifest(tensors).to_dict()))
    [headline] = norm_headline(tmp_path)
    assert (headline.name, headline.value, headline.place) == ("norm_ratio", 0.7, "b")
