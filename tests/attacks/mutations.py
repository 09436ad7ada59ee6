"""Damage to the bytes of a file, and to the structure of a JSON file."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**300, 1e308, -1e308, 1e-320, 0.5, -0.0),
    *(float("nan"), float("inf"), "", "0", " ", "a" * 70_000, "\x00", "\x1b[2J", "a\nb", "\ud800", "日本🙈"),
    *("../secret", "/etc/passwd", "/dev/zero", "<script>", "%s{}", "(a+)+$", "(a|a)*(a|a)*b", "(", "[", "float32"),
    *([], {}, [[]], [None], [0] * 1000, [10**300, 0], [2**40, 2**40], [True], {"": ""}, {"a": {"b": [1]}}),
)
NAMES = ("x", "", "../secret", "a\nb", "\x1b[2J", "\ud800", "__metadata__", "0" * 5000)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a file with damage in its bytes or, if it is JSON or safetensors, in what it says."""
    if rng.random() < 0.3:
        return flipped(content, rng)
    try:
        return damaged_json(content, rng)
    except ValueError:
        pass
    length = int.from_bytes(content[:8], "little")
    if not 8 + length <= len(content):
        return flipped(content, rng)
    header = damaged_json(content[8 : 8 + length], rng)
    body = flipped(content[8 + length :], rng) if rng.random() < 0.1 else content[8 + length :]
    return len(header).to_bytes(8, "little") + header + body


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Change, remove, insert or cut off bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 | 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + rng.choice((1, 8, 100, 10_000))]
            case 3:
                data[at:at] = rng.choice((b"\0", b'"', b"[", b"{", b"\xff\xfe", b"9" * 20, b"\0" * 500))
            case 4 if rng.random() < 0.2:
                del data[at:]
    return bytes(data)


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """Change what a JSON text says, or how it says it; raises `ValueError` if it is none."""
    document = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = _mutated(document, rng)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    match rng.randrange(40):
        case 0:
            return text.encode("utf-16", "surrogatepass")
        case 1:
            text = '{"a":' + "[" * 100_000
        case 2:
            text = text.replace(":", ":" + "[" * 900 + "0" + "]" * 900 + ',"z":', 1)
        case 3:
            text = text[:-1] + ("," + text[1:] if text.startswith("{") else "")  # every key is there twice
        case 4:
            text = "\ufeff" + text
        case 5:
            text = text.replace("0", "9" * 100_000, 1)
    return text.encode("utf-8", "surrogatepass")


def _mutated(document: Any, rng: random.Random) -> Any:
    places = list(_places(document))
    if not places:
        return rng.choice(NASTY)
    holder, key = rng.choice(places)
    match rng.randrange(12):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key)
        case 2 | 3 if type(holder[key]) is int:
            holder[key] += rng.choice((-1, 1, 7, 8, -8, 2**32))
        case 4:
            other, its_key = rng.choice(places)
            holder[key] = copy.deepcopy(other[its_key])
        case 5 if isinstance(holder, list):
            holder.insert(0, copy.deepcopy(holder[key]))
        case _:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
    return document


def _places(value: Any) -> Any:
    """Yield a container and a key or index for every value inside."""
    keys: Any = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
