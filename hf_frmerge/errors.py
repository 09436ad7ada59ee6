"""Errors a user can cause, each a sentence that says what was expected, what was found and what to do."""

from __future__ import annotations

from collections.abc import Iterable

from hf_frmerge.visible import visible_lines


class MergeError(RuntimeError):
    """A merge cannot start or go on. The message is written for the person who started it."""

    def __str__(self) -> str:
        # Sentences name tensors, keys and files of strangers, and a traceback prints them as they are.
        return visible_lines(super().__str__())


class ArgumentError(MergeError, ValueError):
    """An option or a combination of options makes no sense; nothing was read or written."""


class CheckpointError(MergeError):
    """A checkpoint or adapter is missing, broken, or does not fit the others."""


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity."""


class AmbiguousMeanError(MergeError):
    """The experts of a block balance out (antipodal points), so no mean direction is preferred."""


class ResumeError(MergeError):
    """What is on disk does not belong to this merge, so it cannot be resumed."""


class HubError(MergeError):
    """The Hugging Face Hub refused a request or could not be reached."""


def some(items: Iterable[object], limit: int = 3) -> str:
    """Return the first few items as text, for a message, and the number of the others: `a, b, c and 4 more`."""
    shown = [str(item) for item in items]
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")
