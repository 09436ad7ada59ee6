"""What a merge keeps of its experts, against arithmetic done by hand."""

from __future__ import annotations

import pytest

from hf_frmerge.evaluation.record import Score
from hf_frmerge.evaluation.suite.build_record import recovered


def score(model: str, domain: str, loss: float) -> Score:
    return Score(model, domain, {"loss": loss})


def test_recovery_by_hand() -> None:
    scores = [
        *(score("base", domain, loss) for domain, loss in {"a": 4.0, "b": 3.0}.items()),
        *(score("ea", domain, loss) for domain, loss in {"a": 2.0, "b": 3.5}.items()),  # gains most on a
        *(score("b", domain, loss) for domain, loss in {"a": 3.5, "b": 2.9}.items()),  # a is not its own, b is
        *(score("bad", domain, loss) for domain, loss in {"a": 4.5, "b": 3.2}.items()),
        *(score("merged", domain, loss) for domain, loss in {"a": 2.5, "b": 3.1}.items()),
    ]
    ea, b, bad = recovered(scores, ["merged"], ["ea", "b", "bad"], "base")
    assert (ea.domain, ea.gain, ea.kept, ea.share) == ("a", 2.0, 1.5, 0.75)
    assert (b.domain, b.gain, b.kept) == ("b", pytest.approx(0.1), pytest.approx(-0.1))
    assert b.share == pytest.approx(-1.0)
    assert bad.domain == "b" and bad.share is None, "an expert that lost everywhere has no gain to keep"
