"""Commands run in forked children, which need no second to import what the parent has imported."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from hf_frmerge.hub.card.card import compiled_template
from hf_frmerge.hub.card.data import TEMPLATE_FILE

_IMPORTED = (
    *("merger", "cli.diff", "cli.merge", "cli.output", "cli.preflight", "cli.render.diff", "cli.render.merges"),
    *("hub.card.describe", "merging.inspection", "merging.outputs.factor_output", "provenance.diff"),
    *("provenance.verify", "evaluation.record"),
    *("checkpoints.adapters.match", "checkpoints.adapters.rows", "merging.engine.sparse_rule", "methods.sparse.rules"),
)
_LIBRARIES = (
    *("email.parser", "encodings.unicode_escape", "encodings.utf_8_sig", "huggingface_hub", "jinja2"),
    *("rich.console", "safetensors.numpy", "tqdm", "yaml"),
)
_WITH_TORCH = ("hf_frmerge.report.figures", "matplotlib.figure", "transformers.models.llama.modeling_llama")

CPU_LIMIT = 20
"""Seconds of CPU time after which a child counts as hanging: time on the clock depends on who else is at work."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, minus the signal that killed it, and what it printed."""

    code: int
    text: str
    cpu_seconds: float

    @property
    def fault(self) -> str:
        """What a user would call a crash; empty if there was none."""
        if self.code in (-signal.SIGXCPU, -signal.SIGALRM):
            return "hangs"
        if self.code < 0 and self.code != -signal.SIGKILL:
            return f"signal {-self.code}"
        return next((sign for sign in ("This was not expected", "Traceback (most recent") if sign in self.text), "")


@dataclass(frozen=True)
class Child:
    """A command at work."""

    pid: int
    log: Path

    def wait(self) -> Ended:
        _, status, usage = os.wait4(self.pid, 0)
        text = self.log.read_text(errors="replace").replace("\r", "\n")
        return Ended(os.waitstatus_to_exitcode(status), text, usage.ru_utime + usage.ru_stime)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def start(command: Sequence[str | Path], log: Path, prepare: Callable[[], object] = lambda: None) -> Child:
    """Fork a child that runs a command of `frmerge`, after `prepare` has changed the child to its liking."""
    from hf_frmerge.cli.main import main

    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, log)
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", errors="replace"), os.fdopen(2, "w", errors="replace")
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(300)  # a child that waits for something that never comes takes no CPU time
        prepare()
        code = 0
        try:
            main([str(argument) for argument in command], prog_name="frmerge")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


def warm_up() -> None:
    """
    Import what a merge and its record import, and compile the template of cards.

    Neither torch nor matplotlib is among it: to fork a process that holds them takes as long as a small merge.
    """
    for name in (*(f"hf_frmerge.{name}" for name in _IMPORTED), *_LIBRARIES):
        import_module(name)
    compiled_template(Path(TEMPLATE_FILE).read_text(encoding="utf-8"))


def import_torch() -> None:
    """Import the heavy libraries that commands load where a file is not what it was."""
    for name in _WITH_TORCH:
        import_module(name)


def run(command: Sequence[str | Path], log: Path, prepare: Callable[[], object] = lambda: None) -> Ended:
    """Run a command to its end."""
    return start(command, log, prepare).wait()


def wait_until(condition: Callable[[], bool], child: Child) -> None:
    """Wait for a condition, or for the end of a child."""
    while not condition() and os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0005)
