"""Types of a record: each annotation stands for what may be there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from hf_frmerge.merging.record.check_types import check_types


@dataclass(frozen=True)
class Inner:
    number: float | None


@dataclass(frozen=True)
class Outer:
    kind: Literal["one", "two"] = "one"
    count: int = 1
    name: str = "x"
    flag: bool = True
    several: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("a", 0.5)
    listed: list[Inner] = field(default_factory=lambda: [Inner(1), Inner(None)])
    table: dict[str, Inner] = field(default_factory=lambda: {"a": Inner(0.5)})
    anything: dict[str, Any] = field(default_factory=lambda: {"a": object()})


def test_what_is_right_passes():
    check_types(Outer())
    check_types(Outer(several=(), listed=[], table={}, pair=("a", 1)))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kind": "three"}, "kind of a Outer is 'three'"),
        ({"kind": ["one"]}, "kind"),
        ({"count": 1.0}, "count"),
        ({"count": True}, "count"),
        ({"count": 2**63}, "count"),
        ({"name": None}, "name"),
        ({"flag": 1}, "flag"),
        ({"several": [1]}, "several"),
        ({"several": (1, "2")}, "several"),
        ({"pair": ("a",)}, "pair"),
        ({"listed": [1]}, "listed"),
        ({"listed": [Inner("x")]}, "number of a Inner is 'x'"),
        ({"listed": [Inner(float("inf"))]}, "number of a Inner"),
        ({"table": {1: Inner(1)}}, "table"),
        ({"table": []}, "table"),
        ({"anything": 1}, "anything"),
        ({"name": list(range(10_000))}, r"name of a Outer is \[0, 1, .{0,100}\.\.\."),
    ],
)
def test_what_is_wrong_is_named(values, named):
    with pytest.raises(ValueError, match=named):
        check_types(Outer(**values))
