from __future__ import annotations

from pathlib import Path

import pytest

from hf_frmerge.errors import MergeError
from hf_frmerge.hub.card.licences import SourceMetadata, combine, read_source_metadata


def decide(*licences: str | None, allowed: tuple[str, ...] = ()):
    return combine([(f"s{i}", SourceMetadata(licence)) for i, licence in enumerate(licences)], allowed=allowed)


def test_licence_shared_by_all_is_kept():
    decision = decide("mit", "mit", "mit")
    assert (decision.licence, decision.conflict, decision.flags) == ("mit", False, ())


@pytest.mark.parametrize("licences", [("mit", "apache-2.0"), ("mit", None), ("mit", "unknown"), (None, None)])
def test_anything_else_is_not_guessed(licences):
    decision = decide(*licences)
    assert decision.licence is None
    assert decision.conflict
    assert [metadata.licence for _, metadata in decision.table] == list(licences)


def test_the_source_without_a_licence_is_named():
    assert "s1" in decide("mit", None).reason
    assert "s0" not in decide("mit", None).reason


def test_a_card_that_names_two_licences_is_not_a_choice_of_ours():
    assert decide("apache-2.0, mit", "apache-2.0, mit").licence is None


def test_licences_called_other_are_equal_only_by_name_and_link():
    one = SourceMetadata("other", "acme-1", "https://acme.example/1")
    two = SourceMetadata("other", "acme-2", "https://acme.example/2")
    same = combine([("a", one), ("b", one)])
    assert (same.licence, same.licence_name, same.licence_link) == ("other", "acme-1", "https://acme.example/1")
    assert combine([("a", one), ("b", two)]).licence is None


@pytest.mark.parametrize("licence", ["cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"])
def test_no_derivatives_is_refused_unless_allowed_by_name(licence):
    decision = decide("mit", licence)
    assert decision.refusals == ("s1",)
    with pytest.raises(MergeError, match=rf"s1 \({licence}\).*--allow-license {licence}"):
        decision.raise_if_refused()
    decide("mit", licence, allowed=(licence,)).raise_if_refused()


def test_nd_inside_another_word_is_no_refusal():
    for licence in ("apache-2.0", "bsd-3-clause", "cc-by-nc-sa-4.0", "intel-research", "postgresql"):
        assert decide(licence, licence).refusals == ()


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ("cc-by-nc-4.0", "commercial"),
        ("cc-by-sa-4.0", "same licence"),
        ("agpl-3.0", "copyleft"),
        ("llama3.1", "naming"),
        ("gemma", "use restrictions"),
        ("creativeml-openrail-m", "use restrictions"),
        ("intel-research", "research"),
        ("fair-noncommercial-research-license", "commercial use and limits use to research"),
        ("other", "read its text"),
    ],
)
def test_conditions_that_reach_the_merge_are_flagged(licence, words):
    (flag,) = decide(licence, licence).flags
    assert words in flag
    assert "s0 and s1" in flag


@pytest.mark.parametrize("licence", ["mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense"])
def test_permissive_licences_raise_no_flag(licence):
    assert decide(licence, licence).flags == ()


def test_front_matter_is_read(tmp_path: Path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: Apache-2.0\nlanguage:\n- en\n- de\ndatasets: org/data\ntags: [math, merge]\n---\n# Title\n"
    )
    assert read_source_metadata(tmp_path) == SourceMetadata(
        "apache-2.0", None, None, ("en", "de"), ("org/data",), ("math", "merge")
    )


@pytest.mark.parametrize(
    "text",
    [
        "# no front matter\n",
        "---\nlicense: [unclosed\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: mit\n",  # never closed
        "---\nlicense: 7\n---\n",
        "text first\n---\nlicense: mit\n---\n",
        "",
    ],
)
def test_a_card_that_cannot_be_read_says_nothing(tmp_path: Path, text: str):
    (tmp_path / "README.md").write_text(text)
    assert read_source_metadata(tmp_path) == SourceMetadata()


def test_no_card_says_nothing(tmp_path: Path):
    assert read_source_metadata(tmp_path) == SourceMetadata()


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path):
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\nlanguage: no\r\n---\r\n")
    assert read_source_metadata(tmp_path) == SourceMetadata("mit")  # YAML reads `no` as false: dropped, not guessed
