"""Tensors that are not merged, by name: left out of the output, or taken whole from one of the models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.values import did_you_mean

BASE = "base"
"""Name of the base model in a rule of `take`, as no number stands for it."""


@dataclass(frozen=True)
class TensorRules:
    """
    Rules of the options `leave_out` and `take`. An expression is searched for anywhere in a name (`re.search`).

    Attributes:
        leave_out: expressions of tensors that the output does not have.
        take: expressions of tensors that are copied, and the index of the model they are copied from; -1 is the base.
    """

    leave_out: tuple[re.Pattern[str], ...] = ()
    take: tuple[tuple[re.Pattern[str], int], ...] = ()

    @classmethod
    def parse(cls, leave_out: Sequence[str] | None, take: Sequence[str] | None) -> TensorRules:
        """
        Parse rules of which the experts are numbers, as `with_numbers` writes them.

        Raises:
            ArgumentError: If something is not a regular expression.
        """
        pairs = [rule.rpartition("=") for rule in take or ()]
        return cls(
            tuple(_compiled("leave_out", text) for text in leave_out or ()),
            tuple((_compiled("take", text), -1 if model == BASE else int(model) - 1) for text, _, model in pairs),
        )

    def leaves_out(self, name: str) -> bool:
        """Whether a rule leaves the tensor out."""
        return any(pattern.search(name) for pattern in self.leave_out)

    def decides(self, name: str) -> bool:
        """Whether a rule says what becomes of the tensor, so that it is not merged."""
        return self.leaves_out(name) or any(pattern.search(name) for pattern, _ in self.take)


def check_rules(leave_out: Sequence[str] | None, take: Sequence[str] | None) -> None:
    """Raise `ArgumentError` if a rule is no regular expression, or if one of `take` names no model."""
    for text in leave_out or ():
        _compiled("leave_out", text)
    for rule in take or ():
        text, equals, model = rule.rpartition("=")
        if not (text and equals and model):
            raise ArgumentError(
                f"`take` has {rule!r}, but must read REGEX=EXPERT, such as 'classifier=org/model', or "
                f"'classifier=2' for the second expert, or 'classifier={BASE}' for the base model."
            )


def with_numbers(take: Sequence[str] | None, experts: Sequence[str], has_base: bool) -> list[str] | None:
    """
    Write the rules of `take` with numbers in place of the names of experts: the record shows no local path.

    Args:
        take (`Sequence[str]`, *optional*): `REGEX=EXPERT`: the expert as the user wrote it, its number, or `base`.
        experts (`Sequence[str]`): The experts as the user wrote them.
        has_base (`bool`): Whether there is a base model.

    Raises:
        ArgumentError: If a rule names a model that takes no part.
    """
    return take if take is None else [_numbered(rule, experts, has_base) for rule in take]


def _numbered(rule: str, experts: Sequence[str], has_base: bool) -> str:
    # Paths may hold "=", so the names of the experts come first.
    named = max((name for name in experts if rule.endswith(f"={name}")), key=len, default=None)
    if named is not None:
        if experts.count(named) > 1:
            raise ArgumentError(f"`take` has {rule!r}, but {named!r} is listed twice. Give the number of the expert.")
        return f"{rule[: -len(named)]}{experts.index(named) + 1}"
    model = rule.rpartition("=")[2]
    if (model == BASE and has_base) or (model.isdecimal() and 1 <= int(model) <= len(experts)):
        return rule
    what = "no base model was given" if model == BASE else f"{model!r} is none of the experts"
    raise ArgumentError(
        f"`take` has {rule!r}, but {what}. Write an expert exactly as in the list of experts "
        f"({', '.join(map(repr, experts))}), or its number, from 1 to {len(experts)}, or {BASE!r} for the base "
        f"model.{did_you_mean(model, experts)}"
    )


def _compiled(option: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ArgumentError(f"`{option}`: {text!r} is not a regular expression: {error}.") from error
