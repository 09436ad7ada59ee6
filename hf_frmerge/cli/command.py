"""Base class of all commands: turns errors into a message and an exit code, and sends logs and progress to stderr."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.visible import visible_lines

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
_DEBUG = "hf_frmerge.debug"


class Failure(click.ClickException):
    """Error with an exit code; click prints its message on stderr."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


class _VisibleFormatter(logging.Formatter):
    """Formatter that shows control characters instead of sending them to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible_lines(super().format(record))


class SectionOption(click.Option):
    """Option that the help lists under the heading `section`."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class FrmergeCommand(click.Command):
    """
    Command with a `--debug` option that reports errors as one message and an exit code.

    Exit codes: 2 for wrong usage (click's own errors and `ArgumentError`), 1 for any other failure, 130 for Ctrl-C.
    With `--debug` the original exception propagates.

    Args:
        on_interrupt (`str`, *optional*):
            Sentence shown after Ctrl-C, which says how to continue.
    """

    def __init__(self, *args: Any, on_interrupt: str = "Nothing was written.", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.on_interrupt = on_interrupt
        self.params.append(
            SectionOption(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=lambda ctx, param, value: ctx.meta.update({_DEBUG: value}),
                help="Show the traceback of an error.",
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, turning exceptions into a message and an exit code."""
        with _terminal_output(), _printable_stdout():
            try:
                return super().invoke(ctx)
            # Click's own exceptions have messages and exit codes already.
            except (click.exceptions.Exit, click.Abort, click.ClickException):
                raise
            except KeyboardInterrupt:
                raise Failure(f"Interrupted. {self.on_interrupt}", INTERRUPTED) from None
            except Exception as error:
                _close_bars()
                # Click handles a closed pipe itself, but only if it sees the OSError.
                if ctx.meta[_DEBUG] or _is_closed_pipe(error):
                    raise
                raise _as_failure(error) from error

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options under their headings, in the order of each heading's first option."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                section = param.section if isinstance(param, SectionOption) else "Options"
                sections.setdefault(section, []).append(record)
        sections["Options"] = sections.pop("Options", [])  # the general ones last
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def yield_idle_cores() -> None:
    """
    Make idle torch threads sleep instead of spin; call before torch is imported.

    Spinning gains nothing on an idle machine. On one shared with other work it made evaluation 5 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def say(text: str, **style: Any) -> None:
    """Print a line that may name what strangers named, in a style of `click.secho`."""
    click.secho(visible_lines(text), **style)


def warn_of_token(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Say that a token on the command line is no secret; a callback of its option."""
    if value is not None:
        say(
            f"Warning: {param.opts[0]} shows your token to everyone who can list the processes of this machine. Set "
            "HF_TOKEN, or log in with `hf auth login`, and leave it out.",
            err=True,
            fg="yellow",
        )
    return value


token_option = click.option(
    "--token",
    callback=warn_of_token,
    help="Token for the Hub. Better not given here, where others on this machine can read it: set HF_TOKEN, or log in "
    "with `hf auth login`.",
)


pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Take weights that are pickles where a model has no others. They are read as torch.load(weights_only=True) "
    "finds them: code that a pickle names is not run.",
)


@contextmanager
def results_only() -> Iterator[None]:
    """Redirect what libraries print to stderr, so that stdout has only the command's result and can be piped."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def _terminal_output() -> Iterator[None]:
    """Show warnings and log records as plain lines on stderr, and restore both systems afterwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_VisibleFormatter("%(message)s"))
    package = logging.getLogger("hf_frmerge")
    package.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from libraries, meant for developers
            warnings.showwarning = lambda message, *_, **__: say(f"Warning: {message}", err=True, fg="yellow")
            yield
    finally:
        package.removeHandler(handler)


def _close_bars() -> None:
    """Leave the line of a progress bar, on which an error would be printed otherwise."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


@contextmanager
def _printable_stdout() -> Iterator[None]:
    """Let no result fail at its last step because stdout is closed, or has no characters beyond ASCII."""
    with ExitStack() as stack:
        if sys.stdout is None:  # closed by the caller, as in `frmerge ... >&-`
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
        elif isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        yield


def _is_closed_pipe(error: Exception) -> bool:
    """Whether stdout was closed by its reader, as in `frmerge inspect ... | head`; click then exits silently."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _as_failure(error: Exception) -> Failure:
    """Convert an exception to a `Failure`; unexpected ones keep their type in the message."""
    if isinstance(error, ArgumentError):
        return Failure(str(error), USAGE)
    if isinstance(error, MergeError):
        return Failure(str(error), FAILURE)
    if isinstance(error, OSError):
        return Failure(_system_sentence(error), FAILURE)
    if isinstance(error, MemoryError):
        return Failure(
            "There is not enough memory. Give the command more, or make it take less: a smaller --memory-budget and "
            "--num-workers 1, or for an evaluation a smaller --batch-size.",
            FAILURE,
        )
    return Failure(
        f"{type(error).__name__}: {error}\nThis was not expected. Run the command again with --debug to see where it "
        "happened.",
        FAILURE,
    )


def _system_sentence(error: OSError) -> str:
    """Say what the system refused, where no code nearer to it did."""
    from hf_frmerge.checkpoints.disk import disk_error

    if error.filename is not None:
        return str(disk_error(error, Path(os.fsdecode(error.filename)), "read or written"))
    return (
        f"The system refused: {error.strerror or error}. Files that were complete stay so. If this was the output of "
        "the command, send it elsewhere, then run the command again; an interrupted merge goes on with --resume."
    )
