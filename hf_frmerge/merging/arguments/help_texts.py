"""What help texts of options say of methods, and the form in which a field keeps its help text."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hf_frmerge.methods.table import METHODS


def methods_with(option: str) -> str:
    """Return the names of the methods that use an option, for a help text."""
    return ", ".join(method.name for method in METHODS.values() if option in method.options)


def adding() -> str:
    """Return the names of the methods for which weights are factors, for a help text."""
    return ", ".join(method.name for method in METHODS.values() if method.adds)


def default_densities() -> str:
    """Return the defaults of the methods that have one, for a help text."""
    return ", ".join(f"{method.density:g} for {method.name}" for method in METHODS.values() if method.density)


def described(text: str, choices: Collection[str] | None = None) -> dict[str, Any]:
    """Return the metadata of a field: what it does, for every help, and the values it may have."""
    return {"help": text} if choices is None else {"help": text, "choices": choices}
