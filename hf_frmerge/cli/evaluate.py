"""`frmerge evaluate`: compare a merged model with its experts and base on the user's texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from hf_frmerge.cli.command import FAILURE, FrmergeCommand, results_only, say, yield_idle_cores
from hf_frmerge.cli.evaluating import (
    MEASURING,
    batch_size_option,
    block_size_option,
    eval_dtype_option,
    evaluation_bar,
    named_files,
    option,
)
from hf_frmerge.errors import ArgumentError, MergeError

if TYPE_CHECKING:
    from hf_frmerge.evaluation.headlines import Headline
    from hf_frmerge.evaluation.record import EvaluationRecord
    from hf_frmerge.evaluation.suite.settings import SuiteOptions
    from hf_frmerge.merging.callbacks.thresholds import Threshold

_MODELS, _AFTER = "Models and data", "What is done with it"


@click.command("evaluate", cls=FrmergeCommand)
@click.argument("model")
@option(
    _MODELS,
    "--experts",
    multiple=True,
    metavar="EXPERT",
    help="Model to compare with; give it once per expert. Default: those MODEL was merged from.",
)
@option(
    _MODELS,
    "--base-model",
    metavar="MODEL",
    help="Base of the experts, also what adapters are put on. Default: theirs.",
)
@option(
    _MODELS,
    "--data",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Text to predict: a text file, or .jsonl, .json, .csv, .parquet with a column text (and label, for a "
    "classifier); for classifiers of images a folder with a folder of them for every label, or a column image. Give "
    "it once per domain; a domain named like an expert is that expert's own.",
)
@option(
    _MODELS,
    "--lm-eval",
    "lm_eval",
    multiple=True,
    metavar="TASK",
    help="Also run a task of lm-evaluation-harness: a .yaml file, hellaswag, bbh, mmlu-pro, musr, gpqa-diamond, or "
    "any other it knows.",
)
@option(
    _MODELS,
    "--allow-pickle",
    is_flag=True,
    help="Take weights that are pickles where a model has no others; they are loaded with weights_only=True.",
)
@batch_size_option
@block_size_option
@option(MEASURING, "--no-packing", is_flag=True, help="Read every row by itself, not joined into blocks.")
@eval_dtype_option
@option(
    MEASURING,
    "--device-map",
    metavar="MAP",
    help="Spread models over devices: auto, or a JSON object of module: device.",
)
@option(
    MEASURING,
    "--top-k",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Likeliest tokens kept of every prediction; the distances of the rest are estimated, and the error stated.",
)
@option(MEASURING, "--exact", is_flag=True, help="Keep whole distributions: exact distances, much more disk.")
@option(MEASURING, "--no-generate", is_flag=True, help="Do not let the models continue the texts.")
@option(
    MEASURING,
    "--cache-dir",
    metavar="DIR",
    help="Where results of unchanged models are kept. [default: the user's cache]",
)
@option(MEASURING, "--no-cache", is_flag=True, help="Measure everything again, keep nothing.")
@option(
    _AFTER,
    "--fail-on",
    multiple=True,
    metavar="NAME<VALUE",
    help="End with exit code 1 if a metric is out of bounds, as in effective_rank<0.9 or perplexity>40; may be given "
    "several times.",
)
@option(_AFTER, "--card", is_flag=True, help="Write the model card in MODEL, the folder of a merge, with the results.")
@option(_AFTER, "--json", "as_json", is_flag=True, help="Print the record of the evaluation as JSON.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    model: str,
    experts: tuple[str, ...],
    base_model: str | None,
    data: tuple[str, ...],
    lm_eval: tuple[str, ...],
    allow_pickle: bool,
    card: bool,
    as_json: bool,
    fail_on: tuple[str, ...],
    **how: Any,
) -> None:
    """
    Measure a merged model against its experts on your texts.

    Prints how well every model predicts every text, what the merge keeps of each expert, how far its predictions are
    from theirs and on which tokens, whether its activations have collapsed, and how the models go on after a passage.
    The record is kept in MODEL if a merge wrote that folder.
    """
    from hf_frmerge.checkpoints.lock import refuse_while_merging
    from hf_frmerge.merging.callbacks.thresholds import parse_threshold
    from hf_frmerge.merging.record.manifest import MANIFEST_FILE

    # Everything cheap is checked first: a typo in --fail-on must not show after an hour of measuring.
    refuse_while_merging(model)
    thresholds = [parse_threshold(text) for text in fail_on]
    if not data and not lm_eval:
        raise ArgumentError("There is nothing to evaluate on: give --data FILE, --lm-eval TASK, or both.")
    files = named_files(data)
    is_merge = (Path(model) / MANIFEST_FILE).is_file()
    if card and not is_merge:
        raise ArgumentError(f"--card writes the card of a merge, but {model} is no folder that `frmerge merge` wrote.")
    yield_idle_cores()  # before the imports below, which import torch
    with results_only():
        from hf_frmerge.evaluation.record import merge_digest

        # Taken before measuring, so that `_keep` notices a merge that replaced the model meanwhile.
        measured = merge_digest(model) if is_merge else None
        record = _measure(model, experts, base_model, files, lm_eval, allow_pickle, _Measuring(**how))
        headlines = _keep(record, model, card, measured) if is_merge else _headlines(record)
    if as_json:
        click.echo(json.dumps(record.to_dict(), indent=2))
    else:
        from hf_frmerge.cli.render.evaluation import print_evaluation

        print_evaluation(record)
    if _report_trips(thresholds, headlines):
        ctx.exit(FAILURE)


@dataclass(frozen=True)
class _Measuring:
    """Values of the options under MEASURING."""

    batch_size: int
    block_size: int
    no_packing: bool
    dtype: str
    device_map: str | None
    top_k: int
    exact: bool
    no_generate: bool
    cache_dir: str | None
    no_cache: bool

    def suite_options(self) -> SuiteOptions:
        """Convert to the options of `evaluate_merge`."""
        from hf_frmerge.evaluation.suite.settings import SuiteOptions
        from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

        return SuiteOptions(
            batch_size=self.batch_size,
            block_size=self.block_size,
            packing=not self.no_packing,
            dtype=self.dtype,
            device_map=MergingArguments(eval_device_map=self.device_map).device_map,
            top_k=0 if self.exact else self.top_k,
            n_prompts=0 if self.no_generate else 1,
        )

    @contextmanager
    def cache(self) -> Iterator[str | None]:
        """Yield the cache folder of the suite; `None` is the default one. With `--no-cache`, a temporary folder."""
        if not self.no_cache:
            yield self.cache_dir
            return
        with TemporaryDirectory(prefix="frmerge-evaluate-") as folder:
            yield folder


def _measure(
    model: str,
    experts: tuple[str, ...],
    base_model: str | None,
    files: dict[str, str],
    lm_eval: tuple[str, ...],
    allow_pickle: bool,
    how: _Measuring,
) -> EvaluationRecord:
    """Evaluate all models on the files, and the merged one on tasks of lm-evaluation-harness."""
    from transformers.utils.logging import disable_progress_bar

    from hf_frmerge.evaluation.bridges.harness import run_lm_eval
    from hf_frmerge.evaluation.record import EvaluationRecord
    from hf_frmerge.evaluation.suite.merge_evaluation import evaluate_merge, models_to_measure
    from hf_frmerge.evaluation.suite.settings import RunSettings
    from hf_frmerge.evaluation.text.datasets import read_texts
    from hf_frmerge.merging.record.find_models import find_models_to_compare

    disable_progress_bar()  # one bar per model loaded would break up the bar below
    record = EvaluationRecord()
    if files:
        domains = {name: read_texts(file) for name, file in files.items()}
        found = find_models_to_compare(model, experts, base_model)
        models = models_to_measure(found, model, allow_pickle=allow_pickle)
        with how.cache() as cache_dir, evaluation_bar() as (on_model, on_prediction_step):
            run = RunSettings(cache_dir=cache_dir, on_model=on_model, on_prediction_step=on_prediction_step)
            record = evaluate_merge(models, domains, how.suite_options(), run)
    if lm_eval:
        record.update(run_lm_eval(model, lm_eval, base_model=base_model, batch_size=how.batch_size, dtype=how.dtype))
    return record


def _keep(record: EvaluationRecord, model: str, card: bool, measured: str | None) -> list[Headline]:
    """
    Update the record in the model's folder, write the card if asked, and return the headline scores.

    Raises:
        MergeError: If a merge is writing to the folder, or has replaced the model since `measured` was taken.
    """
    from hf_frmerge.checkpoints.lock import sole_writer
    from hf_frmerge.evaluation.headlines import headlines
    from hf_frmerge.evaluation.record import EvaluationRecord, load_record, merge_digest, save_record
    from hf_frmerge.hub.card.describe import describe_merge
    from hf_frmerge.report.figures import figure_drawer

    with sole_writer(model):
        if merge_digest(model) != measured:
            raise MergeError(f"The model in {model!r} was replaced while it was measured. Evaluate again.")
        # Earlier results stay: `--data` and `--lm-eval` may be run one after the other.
        kept = load_record(model) or EvaluationRecord()
        kept.update(record)
        save_record(model, kept)
        if card:
            describe_merge(model, draw=figure_drawer())
    return headlines(record, model)


def _headlines(record: EvaluationRecord) -> list[Headline]:
    from hf_frmerge.evaluation.headlines import headlines

    return headlines(record)


def _report_trips(thresholds: Iterable[Threshold], measured: list[Headline]) -> bool:
    """
    Report metrics that are out of bounds, and return whether there are any.

    Raises:
        ArgumentError: If a threshold names a metric that was not measured: without an error it would always pass.
    """
    from hf_frmerge.evaluation.headlines import by_key

    named = by_key(measured)
    metrics = {name: headline.value for name, headline in named.items()}
    places = {name: headline.place for name, headline in named.items()}
    trips = []
    for threshold in thresholds:
        if not threshold.find(metrics):
            raise ArgumentError(
                f"--fail-on '{threshold}' is about {threshold.name!r}, which was not measured. There are: "
                f"{', '.join(metrics)}."
            )
        trips += threshold.trips(metrics, places)
    for trip in trips:
        say(f"Failed: {trip.name} is {trip.value:.4g} ({trip.where}), and {trip.bound} fails.", err=True, fg="red")
    return bool(trips)


COMMANDS = {"evaluate": evaluate}
