"""Regular expressions that an adapter brings along: checked before they are used, as one can take for ever."""

from __future__ import annotations

import math
import re

from hf_frmerge.errors import CheckpointError

# The time to find that a pattern does not match grows with the length of a module's path to the power of its
# repetitions, times the alternatives in it. PEFT writes module paths; people write `.*layers\.(0|1|2)\..*q_proj`.
_MOST_REPEATS = 4
_MOST_ALTERNATIVES = 10_000
_LONGEST = 10_000

# What stands for one character, whatever is written in it.
_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP_KIND = re.compile(r"\((\?(:|P?<\w+>|[=!]|<[=!]))?")
_REPEAT = re.compile(r"[*+?]|\{\d*,?\d*\}")


def check_pattern(pattern: str, field: str, spec: str) -> None:
    """
    Check a pattern for module paths.

    Raises:
        CheckpointError: If it is no regular expression, or one that could take for ever: a repeated group, or more
            repetitions and alternatives than any list of modules needs.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"Adapter {spec!r}: {field}[{pattern[:100]!r}] in adapter_config.json is no regular expression: {error}. "
            "Correct it, or save the adapter again with PEFT."
        ) from error
    plain = _GROUP_KIND.sub("(", _ONE_CHARACTER.sub("x", pattern))
    repeats = _REPEAT.findall(plain)
    repeats_a_group = any(repeat != "?" for repeat in re.findall(rf"\)({_REPEAT.pattern})", plain))
    if (
        len(pattern) > _LONGEST
        or len(repeats) > _MOST_REPEATS
        or repeats_a_group
        or _n_alternatives(plain) > _MOST_ALTERNATIVES
    ):
        raise CheckpointError(
            f"Adapter {spec!r}: {field}[{pattern[:100]!r}] in adapter_config.json is a regular expression that could "
            f"take for ever to match. Name the modules in it, or use at most {_MOST_REPEATS} of `*`, `+`, `?`, and "
            "none after a group."
        )


def _n_alternatives(plain: str) -> int:
    """Return an upper limit for the number of ways through the groups of a pattern."""
    choices = [1 + inside.count("|") for inside in re.split(r"[()]", plain)]
    return math.prod(choices)
