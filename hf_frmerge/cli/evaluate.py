"""`frmerge evaluate`: a merged model against its experts and its base, on texts of the user."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hf_frmerge.cli.command import FrmergeCommand, results_only, yield_idle_cores
from hf_frmerge.errors import ArgumentError

if TYPE_CHECKING:
    from hf_frmerge.evaluation.compare import Score


@click.command("evaluate", cls=FrmergeCommand)
@click.argument("model")
@click.option("--experts", multiple=True, metavar="EXPERT", help="Model to compare with; give it once per expert.")
@click.option(
    "--base-model", metavar="MODEL", help="Base of the experts: a row of its own, and what adapters are put on."
)
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="[NAME=]FILE",
    help="Text to predict: a text file, or .jsonl, .json, .csv, .parquet with a column text. Give it once per domain; "
    "a domain named like an expert is that expert's own.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Blocks a forward pass.")
@click.option(
    "--block-size", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens a block of text."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Dtype to evaluate in. auto: the one a model is stored in.",
)
@click.option("--card", is_flag=True, help="Add the scores to the model card in MODEL, the folder of a merge.")
@click.option("--json", "as_json", is_flag=True, help="Print all scores as JSON.")
def evaluate(
    model: str,
    experts: tuple[str, ...],
    base_model: str | None,
    data: tuple[str, ...],
    batch_size: int,
    block_size: int,
    dtype: str,
    card: bool,
    as_json: bool,
) -> None:
    """
    Compare a merged model with its experts on your texts.

    Prints the perplexity of every model on every text, and how much of each expert's gain over the base the merged
    model keeps.
    """
    files = _named_files(data)
    names = _names([*([base_model] if base_model else []), *experts, model])
    yield_idle_cores()
    with results_only():
        from tqdm import tqdm
        from transformers.utils.logging import disable_progress_bar

        from hf_frmerge.evaluation.compare import compare_models, read_texts, recovered

        disable_progress_bar()  # of weights being loaded; the bar below tells enough
        with tqdm(total=len(names) * len(files), desc="Evaluating", unit="text") as bar:
            scores = compare_models(
                {name: spec for spec, name in names.items()},
                {name: read_texts(file) for name, file in files.items()},
                base_model=base_model,
                dtype=dtype,
                batch_size=batch_size,
                block_size=block_size,
                on_score=lambda score: bar.update(),
            )
        rows = []
        if base_model and experts:
            rows = recovered(scores, [names[model]], [names[spec] for spec in experts], names[base_model])
        if card:
            _write_card(model, names[model], scores)
    if as_json:
        result = {"scores": [score.to_dict() for score in scores], "recovery": [row.to_dict() for row in rows]}
        click.echo(json.dumps(result, indent=2))
        return
    from hf_frmerge.cli.render import print_recovery, print_scores

    print_scores(scores, [names[model]])
    if rows:
        print_recovery(rows)


def _write_card(model: str, name: str, scores: Iterable[Score]) -> None:
    from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, save_record
    from hf_frmerge.evaluation.record import Score as Row
    from hf_frmerge.hub.folder import describe_merge
    from hf_frmerge.report.figures import figure_drawer

    rows = []
    for score in scores:
        metrics = {key: getattr(score, key) for key in ("loss", "perplexity", "token_accuracy")}
        rows.append(Row(MERGED if score.model == name else score.model, score.domain, metrics, score.n_tokens))
    save_record(model, EvaluationRecord(scores=rows))
    describe_merge(model, draw=figure_drawer())


def _named_files(data: Iterable[str]) -> dict[str, str]:
    """`["math=a.txt", "b.txt"]` -> `{"math": "a.txt", "b": "b.txt"}`."""
    files: dict[str, str] = {}
    for item in data:
        name, separator, path = item.partition("=")
        if not separator or Path(item).is_file():  # a file may have "=" in its name
            name, path = Path(item).stem, item
        if name in files:
            raise ArgumentError(
                f"Two texts are named {name!r}: {files[name]!r} and {path!r}. Name them apart with --data NAME=FILE."
            )
        files[name] = path
    return files


def _names(specs: Iterable[str]) -> dict[str, str]:
    """Model -> short name: the last part of its path where that tells it apart, else all of it."""
    specs = list(dict.fromkeys(specs))
    short = [Path(spec.partition("@")[0]).name for spec in specs]
    return {spec: name if name and short.count(name) == 1 else spec for spec, name in zip(specs, short)}


COMMANDS = {"evaluate": evaluate}
