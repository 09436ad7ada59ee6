"""Convert values from a command line, a YAML or a JSON file to the types of their fields."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from hf_frmerge.errors import ArgumentError
from hf_frmerge.methods.table import CHOICES, METHODS

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B|B)?\s*", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}

# How far from 1 weights may sum after they were divided by their sum. Divided again they would change in their last
# bits, and a merge with recorded weights would not be the recorded merge.
_ROUNDING = 2.0**-52


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence with the closest known word, with a leading space; empty if no word is close."""
    import difflib  # only after a mistake

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def parse_size(name: str, text: str) -> int:
    """
    Parse a size such as `"512MiB"` (powers of 1024), `"5GB"` (powers of 1000) or `"4096"` to bytes.

    Args:
        name (`str`):
            Name of the option, for the error message.
        text (`str`):
            Number with an optional unit, in upper or lower case.

    Raises:
        ArgumentError: If the text is not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ArgumentError(f"`{name}` expects a size such as '512MiB', '5GB' or a number of bytes, but got {text!r}.")
    number, prefix, binary = match.groups()
    unit = (1024 if binary else 1000) ** _POWERS[prefix.upper()] if prefix else 1
    size = int(Decimal(number) * unit)
    if size < 1:
        raise ArgumentError(f"`{name}` must be at least one byte, but got {text!r}.")
    return size


def coerce(name: str, value: object, hint: Any) -> Any:
    """
    Convert a value from a configuration file to the type of its field.

    YAML 1.1 reads `1e-6` as text and `5` as an integer. So text that spells a number is accepted as a number, and a
    single item as a list of one.

    Args:
        name (`str`):
            Name of the field, for the error message.
        value (`object`):
            Value to convert.
        hint (`type`):
            `float`, `int`, `bool`, `str`, a list of one of them, or any of these `| None`.

    Raises:
        ArgumentError: If the value cannot be converted to that type.
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        return None
    (kind,) = (k for k in kinds if k is not NoneType)
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        if isinstance(value, str):
            # Commas separate numbers; in text (paths, regular expressions) they may belong to the item.
            value = [value] if item is str else value.split(",")
        elif isinstance(value, (dict, bool)) or not isinstance(value, Iterable):
            raise ArgumentError(f"`{name}` expects a list, but got {value!r}.")
        return [coerce(f"{name}[{i}]", element, item) for i, element in enumerate(value)]
    try:
        return _SCALARS[kind](value)
    except (TypeError, ValueError) as error:
        got = f"a value of type {type(value).__name__}" if name.endswith("_token") else repr(value)
        raise ArgumentError(f"`{name}` expects {_KINDS[kind]}, but got {got}.") from error


def validate_weights(weights: Iterable[float] | None, n_experts: int, method: str | None = None) -> list[float]:
    """
    Check the weights of the experts, and divide them by their sum where they are shares; `None` gives equal weights.

    Args:
        weights (`Iterable[float]`, *optional*):
            Finite numbers, one per expert, not all zero.
        n_experts (`int`):
            Number of experts.
        method (`str`, *optional*):
            Method that they are for. Those that add take them as they are, negative ones as well, and by default 1
            for each; to all others they are shares.

    Returns:
        `list[float]`: Weights that this function returned stay as they are, bit for bit.

    Raises:
        ArgumentError: If the number of weights is not `n_experts`, a weight is NaN, infinite, or negative where the
            method has no use for that, or all are zero.
    """
    adds = method is not None and CHOICES[method].adds
    if weights is None:
        return [1.0 if adds else 1 / n_experts] * n_experts
    numbers = [float(w) for w in weights]
    if len(numbers) != n_experts:
        raise ArgumentError(
            f"`weights` needs one number per expert: got {len(numbers)} ({numbers}) for {n_experts} experts. Leave it "
            "out to weigh all experts alike."
        )
    for position, weight in enumerate(numbers, start=1):
        if not math.isfinite(weight):
            raise ArgumentError(f"`weights` must be finite, but the weight of expert {position} is {weight}.")
        if weight < 0 and method is not None and not adds:
            adding = [other.name for other in METHODS.values() if other.adds]
            raise ArgumentError(
                f"`weights` must not be negative with method={method!r}, but the weight of expert {position} is "
                f"{weight}: here a weight is a share. To subtract what an expert learned, use method="
                f"{' or '.join(map(repr, adding))}."
            )
    if not any(numbers):
        raise ArgumentError("`weights` are all zero: at least one expert must count.")
    return numbers if adds else as_shares(numbers)


def as_shares(weights: Sequence[float]) -> list[float]:
    """
    Divide weights, not all zero, by the sum of their magnitudes.

    A single non-zero weight becomes exactly 1 or -1. What this function returned stays as it is, bit for bit.
    """
    largest = max(map(abs, weights))
    if largest < 1 and abs(math.fsum(map(abs, weights)) - 1) <= _ROUNDING:
        return list(weights)
    # Scaled by a power of two, which is exact, so that the sum of very large weights does not overflow.
    exponent = math.frexp(largest)[1]
    scaled = [math.ldexp(w, -exponent) for w in weights]
    total = math.fsum(map(abs, scaled))
    return [w / total for w in scaled]


def _as_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        raise TypeError
    try:
        return float(value)
    except OverflowError:  # an integer above the range of float64
        raise ValueError from None


def _as_int(value: object) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    number = _as_float(value)  # 5.0 and "5e3" are whole numbers, too
    if not number.is_integer():
        raise ValueError
    return int(number)


def _as_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower() if isinstance(value, (str, int)) else ""
    if word not in _TRUE | _FALSE:
        raise ValueError
    return word in _TRUE


def _as_text(value: object) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return os.fspath(value)  # type: ignore[call-overload]  # raises TypeError for anything but text and paths


_SCALARS = {float: _as_float, int: _as_int, bool: _as_bool, str: _as_text}
