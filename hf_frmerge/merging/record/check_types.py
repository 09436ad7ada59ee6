"""Check values that were read from a file against the annotations of the dataclass they were put into."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Sizes, counts and indices are 64-bit integers wherever they come from.
_MAX_INT = 2**63 - 1

Check = Callable[[Any], bool]


def check_types(value: Any) -> None:
    """
    Check every field of a dataclass, and of those in it. Infinite numbers, and integers from 2^63, are refused too.

    Args:
        value: Instance of a dataclass.

    Raises:
        ValueError: If a value is not what its field is annotated to be; the message names class and field.
    """
    kind: Any = type(value)
    _check_of(kind)(value)


@cache
def _check_of(hint: Any) -> Check:
    """Return a function that says whether a value is of a type; inside of a dataclass it raises `ValueError`."""

    def is_int(value: Any) -> bool:
        return type(value) is int and abs(value) <= _MAX_INT  # type(): True is no number here

    simple: dict[Any, Check] = {
        Any: lambda value: True,
        float: lambda value: (type(value) is float and not math.isinf(value)) or is_int(value),
        int: is_int,
    }
    if hint in simple:
        return simple[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _check_of_dataclass(hint)
    if origin in (Union, types.UnionType):
        checks = [_check_of(argument) for argument in arguments]
        return lambda value: any(check(value) for check in checks)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in arguments
    if origin is dict:
        of_key, of_value = map(_check_of, arguments)
        return lambda value: isinstance(value, dict) and all(map(of_key, value)) and all(map(of_value, value.values()))
    if origin in (tuple, list):
        items = [_check_of(argument) for argument in arguments if argument is not Ellipsis]
        if origin is list or Ellipsis in arguments:
            return lambda value: isinstance(value, origin) and all(map(items[0], value))
        return lambda value: (
            isinstance(value, tuple)
            and len(value) == len(items)
            and all(check(each) for check, each in zip(items, value))
        )
    return lambda value: isinstance(value, hint)


def _check_of_dataclass(kind: Any) -> Check:
    hints = get_type_hints(kind)
    checks = [(field.name, _check_of(hints[field.name])) for field in fields(kind)]

    def check(value: Any) -> bool:
        if not isinstance(value, kind):
            return False
        for name, is_right in checks:
            if not is_right(getattr(value, name)):
                raise ValueError(f"{name} of a {kind.__name__} is {_short(getattr(value, name))}")
        return True

    return check


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
