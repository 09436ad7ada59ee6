"""Human-readable output of `frmerge evaluate`: tables of an evaluation record, fitting into 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_frmerge.cli.render.terminal import console, print_verdicts
from hf_frmerge.evaluation.record import MERGED, CollapseRatio, EvaluationRecord, Generation, WorstToken
from hf_frmerge.visible import visible
from hf_frmerge.wording import parts
from hf_frmerge.wording.evaluation import evaluation_verdicts, layer_name, weakest_layers
from hf_frmerge.wording.numbers import decimals, number, percent
from hf_frmerge.wording.scores import score_tables

N_WORST_LAYERS = 3
N_WORST_TOKENS = 8
_CONTEXT_CHARS = 44
_WEAK = 0.9  # ratios to the experts' mean below this are printed in yellow


def print_evaluation(record: EvaluationRecord) -> None:
    """Print all parts of a record."""
    out = console()
    print_scores(record)
    _print_recovery(out, record)
    print_functions(record)
    _print_worst_tokens(out, record.worst_tokens)
    _print_generations(out, record)
    print_findings(record)
    for command in record.commands:
        out.print(f"Also run: {command}", style="dim")


def print_scores(record: EvaluationRecord) -> None:
    """Print what the models score on every text, a table a metric."""
    out = console()
    counts = {s.domain: s.n_tokens or s.n_samples for s in record.scores}
    unit = "tokens" if any(s.n_tokens for s in record.scores) else "samples"
    for scores in score_tables(record.scores):
        has_mean = scores.metric.name == "perplexity" and len(scores.domains) > 1
        table = _table("model", *scores.domains, *(["mean"] if has_mean else []))
        for model in scores.models:
            cells = [scores.written(model, domain) for domain in scores.domains]
            if has_mean:
                mean = _geometric_mean([scores.values.get((model, domain)) for domain in scores.domains])
                cells.append(scores.metric.written(mean))
            table.add_row(model, *cells, style="bold" if model == MERGED else None)
        _print(out, f"{scores.metric.heading}, {sum(counts.values()):,} {unit}", table)
        if has_mean:
            out.print("mean: geometric mean over the texts", style="dim")


def print_findings(record: EvaluationRecord) -> None:
    """Print the verdicts on a record, as sentences."""
    out = console()
    out.print()
    print_verdicts(out, evaluation_verdicts(record))


def print_functions(record: EvaluationRecord) -> None:
    """Print distances of predictions, objectives, and the state of the layers."""
    out = console()
    _print_distances(out, record)
    _print_objectives(out, record)
    _print_collapse(out, record.collapse())


def _print_recovery(out: Console, record: EvaluationRecord) -> None:
    """Print each expert's gain over the base, and how much of it the merged model keeps."""
    rows = [row for row in record.recovery if row.model == MERGED]
    if not rows:
        return
    table = _table("expert", "on", "its gain", "kept", "share")
    for row in rows:
        style = "yellow" if row.share is not None and row.share < 0 else None
        table.add_row(row.expert, row.domain, f"{row.gain:+.3f}", f"{row.kept:+.3f}", percent(row.share), style=style)
    _print(out, parts.RECOVERY.title, table)
    out.print("gain: how much better than the base on that text, in nats a token", style="dim")


def _print_distances(out: Console, record: EvaluationRecord) -> None:
    """Print Fisher-Rao distances in radians, KL divergence in nats, and shares of equal guesses."""
    if not record.distances:
        return
    table = _table("on", "from", "to", "mean", "median", "95%", "KL", "same guess")
    # Distances between experts go below the merged model's rows, for scale.
    rows = [row for row in record.distances if row.model == MERGED or {row.model, row.other} <= {*record.experts}]
    rows.sort(key=lambda row: (record.domains.index(row.domain), row.model != MERGED))
    for index, row in enumerate(rows):
        is_last = index + 1 == len(rows) or rows[index + 1].domain != row.domain
        spread = (row.fisher_rao.mean, row.fisher_rao.median, row.fisher_rao.p95)
        table.add_row(
            # A domain is written once, in its first row.
            row.domain if index == 0 or rows[index - 1].domain != row.domain else "",
            row.model,
            row.other,
            *map(number, spread),
            number(row.kl_other_model),
            percent(row.top1_agreement),
            style=None if row.model == MERGED else "dim",
            end_section=is_last,
        )
    _print(out, parts.DISTANCES.title, table)
    out.print("Fisher–Rao distances in radians: 0 is the same prediction, 3.14 nothing in common", style="dim")
    error = max(row.error for row in record.distances)
    exact = f"means are right to {number(error, 1)} rad" if error else "distances are exact"
    out.print(f"KL: from the right model to the left one, nats; {exact}", style="dim")


def _print_objectives(out: Console, record: EvaluationRecord) -> None:
    """Print the merge objective beside its lowest possible value, by domain."""
    if not record.objectives:
        return
    table = _table("on", "this merge", "lowest possible", "to the barycentre")
    for row in record.objectives:
        table.add_row(row.domain, number(row.value, 4), number(row.lowest, 4), f"{number(row.to_barycentre.mean)} rad")
    _print(out, parts.OBJECTIVES.title, table)
    out.print(parts.OBJECTIVES.meaning, style="dim")


def _print_collapse(out: Console, layers: Sequence[CollapseRatio]) -> None:
    """Print the weakest layers in order of depth, and the mean over all."""
    if not layers:
        return
    table = _table("layer", "activation variance", "effective rank")
    for row in sorted(weakest_layers(layers, N_WORST_LAYERS), key=lambda row: row.layer):
        table.add_row(layer_name(row.layer), _ratio(row.activation_variance), _ratio(row.effective_rank))
    table.add_section()
    means = [
        math.fsum(values) / len(layers) for values in zip(*((x.activation_variance, x.effective_rank) for x in layers))
    ]
    table.add_row(f"mean of {len(layers)}", *map(_ratio, means))
    _print(out, parts.LAYERS.title, table)
    out.print("over the experts' mean, weakest layers; 100% means that nothing was lost", style="dim")


def _print_worst_tokens(out: Console, tokens: Iterable[WorstToken]) -> None:
    """Print the tokens with the largest distances, in context."""
    worst = sorted(tokens, key=lambda row: -row.distance)[:N_WORST_TOKENS]
    if not worst:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("where the text goes on with [token]", ratio=1)
    for heading in ("expert", "it says", "merged says", "rad"):
        table.add_column(heading, justify="right" if heading == "rad" else "left", overflow="fold")
    for row in worst:
        context = visible(row.context)[-_CONTEXT_CHARS:]
        table.add_row(
            Text.assemble((f"…{context}", "dim"), (f"[{visible(row.token, spaces=True)}]", "bold")),
            row.expert,
            f"{visible(row.expert_guess, spaces=True)} {percent(row.expert_probability)}",
            f"{visible(row.merged_guess, spaces=True)} {percent(row.merged_probability)}",
            decimals(row.distance, 2),
        )
    _print(out, parts.WORST_TOKENS.title, table)
    out.print(parts.WORST_TOKENS.meaning, style="dim")


def _print_generations(out: Console, record: EvaluationRecord) -> None:
    prompts: dict[tuple[str, str], list[Generation]] = {}
    for row in record.generations:
        prompts.setdefault((row.domain, row.prompt), []).append(row)
    for (domain, prompt), rows in prompts.items():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("model")
        table.add_column("goes on", ratio=1, overflow="fold")
        table.add_column("repeats", justify="right")
        for row in sorted(rows, key=lambda row: row.model == MERGED):
            text = visible(row.text)
            table.add_row(row.model, text, percent(row.repetition), style="bold" if row.model == MERGED else None)
        _print(out, f"After a passage of {domain} that ends …{visible(prompt)[-_CONTEXT_CHARS:]}", table)


def _table(first: str, *others: str) -> Table:
    """Return an empty table; numeric columns are aligned right, and long names are folded."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        is_name = heading in ("on", "from", "to")
        table.add_column(heading, justify="left" if is_name else "right", overflow="fold")
    return table


def _print(out: Console, title: str, table: Table) -> None:
    out.print()
    out.print(title, style="bold")
    out.print(table)


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    """Return the geometric mean; `None` if a value is missing, infinite or not positive."""
    known = [value for value in values if value is not None and 0 < value < math.inf]
    # Leaving out a missing value would make the model look better or worse than the others.
    return math.exp(math.fsum(map(math.log, known)) / len(known)) if len(known) == len(values) else None


def _ratio(value: float) -> Text:
    weak = not value >= _WEAK  # also for NaN
    return Text(percent(value, 1), style="yellow" if weak else "")
