"""click's runner of commands, with stdout and stderr apart whatever the version of click."""

from __future__ import annotations

import inspect

from click.testing import CliRunner


def click_runner() -> CliRunner:
    """Return a runner; click 8.1 must be told to keep the two apart, later versions do not take the option."""
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return CliRunner(**apart)
