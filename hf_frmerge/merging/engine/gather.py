"""What processes that decide together exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Gather = Callable[[list[Any]], list[Any]]
"""Exchange between processes: returns what all of them pass."""

_Name = TypeVar("_Name")


def joined(gather: Gather | None, by_name: dict[_Name, Any]) -> dict[_Name, Any]:
    """Combine the entries of all processes."""
    return by_name if gather is None else {name: value for part in gather([by_name]) for name, value in part.items()}
