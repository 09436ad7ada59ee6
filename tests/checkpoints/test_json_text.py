"""JSON of others: what the standard library would take, and what a reader of models must not."""

from __future__ import annotations

import json
import time

import pytest

from hf_frmerge.checkpoints.json_text import parse_json


@pytest.mark.parametrize(
    "value", [{"a": [1, -2, 1e300, None, True, "日本🙈"]}, [], "x", {"deep": [[[[{}]]]]}, 10**308]
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_what_json_can_say_is_read(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_transformers_writes_infinity_into_configs():
    content = b'{"time_step_limit": [0.0, Infinity]}'
    assert parse_json(content) == json.loads(content)
    with pytest.raises(ValueError, match="Infinity is no number"):
        parse_json(content, finite=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        (b"[" * 101 + b"]" * 101, "more than 100 levels"),
        (b"[" * 100_000, "more than 100 levels"),
        (b"9" * 1001, "has 1001 digits"),
        ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\\ud800"}', "half of a character"),
        (b'{"a": 1', "Expecting"),
    ],
)
def test_what_is_refused_and_why(content, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(content)


@pytest.mark.parametrize(
    "content",
    [
        b"[" + b",".join([b"9" * 4000] * 5000) + b"]",
        b"9" * 20_000_000,
        b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b',"0":0}',
    ],
)
def test_hostile_numbers_and_keys_take_no_time(content):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"digits|twice"):
        parse_json(content)
    assert time.process_time() - start < 2


def test_numbers_as_long_as_they_may_be_take_no_time():
    start = time.process_time()
    assert parse_json(b"[" + b",".join([b"9" * 1000] * 5000) + b"]") == [10**1000 - 1] * 5000
    assert time.process_time() - start < 2


def test_digits_in_a_text_are_no_number():
    assert parse_json(b'{"a": "' + b"9" * 2000 + b'", "b": 7}') == {"a": "9" * 2000, "b": 7}
