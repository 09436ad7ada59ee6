from __future__ import annotations

from pathlib import Path

from hf_frmerge.evaluation.models.names import models_of_merge


def test_models_have_short_names_of_their_own(tmp_path: Path, monkeypatch) -> None:
    for name in ("one/math", "two/math", "three/base"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one" / "math")
    experts = [".", str(tmp_path / "two" / "math"), "org/code@v1", "org/merged", "s3://bucket/law/"]
    models, roles = models_of_merge(experts, str(tmp_path / "three" / "base"), "out")
    assert list(models) == ["base", "math", "math-2", "code", "merged-2", "law", "merged"]
    assert list(models.values()) == [str(tmp_path / "three" / "base"), *experts, "out"]
    assert list(roles.values()) == ["base", *["expert"] * 5, "merged"]


def test_an_expert_is_not_taken_for_the_base(tmp_path: Path) -> None:
    assert list(models_of_merge(["org/base", "org/base-2"])[0]) == ["base-2", "base-2-2"]
