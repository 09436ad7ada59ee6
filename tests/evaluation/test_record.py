from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from evaluation_records import make_record
from safetensors.numpy import save_file

from hf_frmerge.errors import CheckpointError
from hf_frmerge.evaluation.record import (
    MERGED,
    EvaluationRecord,
    LayerActivations,
    Recovered,
    Score,
    load_record,
    save_record,
)
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.record.manifest import EVALUATION_FILE


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = make_record()
    save_record(tmp_path, record)
    assert load_record(tmp_path) == record
    assert load_record(tmp_path / "elsewhere") is None


def test_a_record_of_a_replaced_merge_is_not_taken(tmp_path: Path) -> None:
    save_file({"a": np.ones(2)}, tmp_path / COEFFICIENTS_FILE)
    save_record(tmp_path, make_record())
    assert load_record(tmp_path) is not None
    save_file({"a": np.zeros(2)}, tmp_path / COEFFICIENTS_FILE)
    assert load_record(tmp_path) is None


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    shareless = Recovered(MERGED, "expert-math", "math", -0.1, 0.2, None)
    record = make_record(scores=[Score("base", "math", {"perplexity": math.inf})], recovery=[shareless])
    save_record(tmp_path, record)
    text = (tmp_path / EVALUATION_FILE).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["scores"][0]["metrics"] == {"perplexity": None}
    again = load_record(tmp_path)
    assert again is not None and math.isnan(again.scores[0].metrics["perplexity"])
    assert again.recovery == [shareless]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / EVALUATION_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=EVALUATION_FILE):
        load_record(tmp_path)


def test_collapse_is_the_merged_model_over_the_mean_of_the_experts() -> None:
    record = make_record(
        layers=[
            LayerActivations("expert-math", 1, 2.0, 10.0),
            LayerActivations("expert-code", 1, 4.0, 30.0),
            LayerActivations("base", 1, 100.0, 100.0),
            LayerActivations(MERGED, 1, 1.5, 30.0),
            LayerActivations(MERGED, 2, 1.0, 1.0),
        ]
    )
    [ratio] = record.collapse()
    assert (ratio.layer, ratio.activation_variance, ratio.effective_rank) == (1, 0.5, 1.5)


def test_an_update_replaces_what_was_measured_again_and_keeps_the_rest() -> None:
    record = make_record()
    new = EvaluationRecord(
        models={"other": "expert"},
        scores=[Score(MERGED, "math", {"loss": 1.0}), Score("other", "math", {"loss": 9.0})],
        recovery=[Recovered(MERGED, "expert-math", "math", 1.0, 0.9, 0.9)],
        commands=["run"],
    )
    n_scores = len(record.scores)
    record.update(new)
    record.update(new)
    assert list(record.models)[-1] == "other" and record.commands == ["run"]
    assert len(record.scores) == n_scores + 1
    assert [s.metrics for s in record.scores if (s.model, s.domain) == (MERGED, "math")] == [{"loss": 1.0}]
    assert [r.share for r in record.recovery] == [0.5, 0.9]
    assert len(record.layers) == len(make_record().layers)
