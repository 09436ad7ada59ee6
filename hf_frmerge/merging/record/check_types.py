"""Check values that were read from a file against the annotations of the dataclass they were put into."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Sizes, counts and indices are 64-bit integers wherever they come from.
_MAX_INT = 2**63 - 1

Check = Callable[[Collection[Any]], bool]
"""
Function that says whether all of many values are of a type; inside of a dataclass it raises `ValueError`.

It gets many at a time, since records have as many tensors as a model: to look at the set of their types takes a tenth
of what it takes to look at every value.
"""


def check_types(value: Any) -> None:
    """
    Check every field of a dataclass, and of those in it. Infinite numbers, and integers from 2^63, are refused too.

    Args:
        value: Instance of a dataclass.

    Raises:
        ValueError: If a value is not what its field is annotated to be; the message names class and field.
    """
    kind: Any = type(value)
    _check_of(kind)([value])


@cache
def _check_of(hint: Any) -> Check:
    if hint is Any:
        return lambda values: True
    if hint in (int, float):
        return _are_ints if hint is int else _are_numbers
    if is_dataclass(hint):
        return _check_of_dataclass(hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _check_of_union(arguments)
    if origin is Literal:
        return lambda values: all(isinstance(value, str) and value in arguments for value in values)
    if origin is dict:
        of_keys, of_values = map(_check_of, arguments)
        return lambda values: (
            _are_all(dict, values)
            and of_keys([key for value in values for key in value])
            and of_values([item for value in values for item in value.values()])
        )
    if origin is list or Ellipsis in arguments:
        of_items = _check_of(arguments[0])
        return lambda values: _are_all(origin, values) and of_items([item for value in values for item in value])
    if origin is tuple:
        places = [_check_of(argument) for argument in arguments]
        return lambda values: (
            _are_all(tuple, values)
            and all(len(value) == len(places) for value in values)
            and all(check(column) for check, column in zip(places, zip(*values)))
        )
    return lambda values: _are_all(hint, values)


def _are_all(kind: Any, values: Collection[Any]) -> bool:
    return all(issubclass(each, kind) for each in set(map(type, values)))


def _are_ints(values: Collection[Any]) -> bool:
    # The set has no bool where there is none: True is no number here.
    return set(map(type, values)) <= {int} and (not values or -_MAX_INT <= min(values) <= max(values) <= _MAX_INT)


def _are_numbers(values: Collection[Any]) -> bool:
    if set(map(type, values)) <= {float}:
        return math.inf not in values and -math.inf not in values
    floats = [value for value in values if type(value) is float]
    return (
        len(floats) < len(values) and _are_numbers(floats) and _are_ints([v for v in values if type(v) is not float])
    )


def _check_of_union(arguments: tuple[Any, ...]) -> Check:
    """Check each value against the types it may have, those without a field first: most are None."""
    checks = [_check_of(argument) for argument in arguments if argument is not types.NoneType]
    may_be_none = len(checks) < len(arguments)

    def check(values: Collection[Any]) -> bool:
        left = [value for value in values if value is not None] if may_be_none else values
        if len(checks) == 1:
            return checks[0](left)
        return all(any(check([value]) for check in checks) for value in left)

    return check


def _check_of_dataclass(kind: Any) -> Check:
    hints = get_type_hints(kind)
    checks = [(field.name, attrgetter(field.name), _check_of(hints[field.name])) for field in fields(kind)]

    def check(values: Collection[Any]) -> bool:
        if not _are_all(kind, values):
            return False
        for name, get, are_right in checks:
            column = list(map(get, values))
            if not are_right(column):
                wrong = next(value for value in column if not are_right([value]))
                raise ValueError(f"{name} of a {kind.__name__} is {_short(wrong)}")
        return True

    return check


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
