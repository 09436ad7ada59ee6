"""What the commands that evaluate models share: options, names for texts, and one progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from hf_frmerge.cli.command import SectionOption, results_only, yield_idle_cores
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.visible import visible

MEASURING = "How it is measured"
"""Heading of the options about measuring."""


def option(section: str, *names: str, **settings: Any) -> Any:
    """Declare an option listed under the heading `section`."""
    return click.option(*names, cls=SectionOption, section=section, **settings)


batch_size_option = option(
    MEASURING,
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Blocks or rows a forward pass.",
)
block_size_option = option(
    MEASURING,
    "--block-size",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens a block of text.",
)
eval_dtype_option = option(
    MEASURING,
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Dtype to evaluate in. auto: the one a model is stored in.",
)


OUTPUT = "Output"
"""Heading of the options about the results."""

DATA = "Models and data"
"""Heading of the options about what is measured."""


def models_and_data(chosen: str) -> Any:
    """Declare the options of commands that try merges on a part of the texts, where they choose what `chosen` says."""
    options = (
        option(
            DATA,
            "--data",
            multiple=True,
            required=True,
            metavar="[NAME=]FILE",
            help="Text to predict: a text file, or .jsonl, .json, .csv, .parquet with a column text (and label, for "
            "classifiers). Give it once per domain; a domain named like an expert is that expert's own.",
        ),
        option(
            DATA,
            "--base-model",
            metavar="MODEL",
            help="Model the experts were fine-tuned from. Default: the one adapters name. Without it losses are "
            "compared.",
        ),
        option(
            DATA,
            "--max-tokens",
            type=click.IntRange(min=0),
            default=2048,
            show_default=True,
            help=f"Tokens of every text that are used, a quarter of them to choose {chosen}, the others to report; 0 "
            "for all.",
        ),
    )

    return _declaring(options)


def measured_into(folder: str, *, again: str, anew: str) -> Any:
    """
    Declare how merges are measured, and where the results of commands that try many go.

    Args:
        folder: Default of the output folder; also what the record is of.
        again: Sentence on what another run in the same folder does.
        anew: What else a folder may hold, that is overwritten.
    """
    options = (
        batch_size_option,
        block_size_option,
        eval_dtype_option,
        option(
            MEASURING,
            "--cache-dir",
            metavar="DIR",
            help="Where results of unchanged experts are kept. [default: the user's cache]",
        ),
        option(
            OUTPUT,
            "--output-dir",
            metavar="DIR",
            default=folder,
            show_default=True,
            help=f"Folder for the results. {again}",
        ),
        option(OUTPUT, "--overwrite", is_flag=True, help=f"Begin anew in a folder with {anew}."),
        option(OUTPUT, "--json", "as_json", is_flag=True, help=f"Print the record of the {folder} as JSON."),
    )
    return _declaring(options)


def _declaring(options: Sequence[Any]) -> Any:
    """Return a decorator that declares options in their order."""

    def declare(command: Any) -> Any:
        for each in reversed(options):
            command = each(command)
        return command

    return declare


def bench_arguments(batch_size: int, block_size: int, options: Mapping[str, Any]) -> MergingArguments:
    """Return the arguments that all merges of a command share: its options, but those that were not given."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    return MergingArguments(per_device_eval_batch_size=batch_size, eval_block_size=block_size, **given)


@contextmanager
def bench_bar() -> Iterator[tuple[Any, Any]]:
    """Do what `evaluation_bar` does for a command that measures many merges, on cores that nothing else needs."""
    yield_idle_cores()  # before the imports, of torch, of those who use this
    with results_only():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # one bar per model loaded would break up this one
        with evaluation_bar() as callbacks:
            yield callbacks


@contextmanager
def evaluation_bar() -> Iterator[tuple[Any, Any]]:
    """Show one progress bar for all models; its total grows with every data loader, as only those are known."""
    from tqdm import tqdm

    with tqdm(desc="Evaluating", unit="batch", total=0) as bar:
        last: list[Any] = []

        def on_model(name: str) -> None:
            bar.set_description(f"Evaluating {visible(name)}")

        def on_prediction_step(loader: Any) -> None:
            if not last or last[0] is not loader:
                last[:] = [loader]
                bar.total = (bar.total or 0) + len(loader)
            bar.update()

        yield on_model, on_prediction_step


def named_files(data: Iterable[str]) -> dict[str, str]:
    """
    Map domains to files: `["math=a.txt", "b.txt"]` -> `{"math": "a.txt", "b": "b.txt"}`.

    Raises:
        ArgumentError: If two files have the same name.
    """
    files: dict[str, str] = {}
    for item in data:
        name, separator, path = item.partition("=")
        if not separator or Path(item).is_file():  # a file name may contain "="
            name, path = Path(item).stem, item
        if name in files:
            raise ArgumentError(
                f"Two texts are named {name!r}: {files[name]!r} and {path!r}. Name them apart with --data NAME=FILE."
            )
        files[name] = path
    return files


def numbers(option: str, text: str) -> list[float]:
    """
    Read comma-separated numbers.

    Raises:
        ArgumentError: If they are none.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(
            f"{option} takes numbers with commas between them, such as 0.5,1,2, got {text!r}."
        ) from None
