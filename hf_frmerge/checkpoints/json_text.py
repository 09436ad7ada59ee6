"""Parse JSON that others wrote: bounded in depth and digits, in UTF-8 only, without duplicate keys."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

# Far more than any config has; a recursion over what was parsed stays far below Python's limit.
_MAX_DEPTH = 100
# float64 ends at 309 digits. To convert millions of them takes minutes.
_MAX_DIGITS = 1000
_MANY_DIGITS = re.compile(rb"(?<!\d)\d{%d}" % (_MAX_DIGITS + 1))
# Only these escapes can make a character that no file can hold: half of a surrogate pair.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(content: bytes, *, finite: bool = False) -> Any:
    """
    Parse JSON text.

    Args:
        content: The text, which must be UTF-8.
        finite: Whether to refuse `NaN` and `Infinity`. They are no JSON, but transformers writes them into configs.

    Raises:
        ValueError: If it is no JSON or goes beyond these bounds; the message ends a sentence.
    """
    hooks: dict[str, Any] = {"parse_constant": _refuse_constant} if finite else {}
    if _MANY_DIGITS.search(content):  # a number or a part of a text; a call for every number of a header takes long
        hooks["parse_int"] = _integer
    try:
        value = json.loads(content.decode(), object_pairs_hook=_without_duplicates, **hooks)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{error.object[error.start]!r} is half of a character") from None
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:100]!r} is there twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [item for item in level if type(item) in (dict, list)]  # the only ones that JSON has
        if not level:
            return
        level = [item for holder in level for item in (holder.values() if type(holder) is dict else holder)]
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
