"""What `frmerge evaluate` prints for people: the record of an evaluation as tables that fit into 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_frmerge.cli.render import console
from hf_frmerge.evaluation.record import MERGED, CollapseRatio, EvaluationRecord, Generation, WorstToken

N_WORST_LAYERS = 3
N_WORST_TOKENS = 8
_CONTEXT_CHARS = 44
# Metric -> heading, and how a value is written. Others are written with four digits under their own name.
_METRICS = {
    "perplexity": ("Perplexity (lower is better)", "{:,.2f}"),
    "token_accuracy": ("Share of tokens guessed first", "{:.1%}"),
    "accuracy": ("Accuracy", "{:.1%}"),
    "loss": ("Loss, nats", "{:.4f}"),
}
_WEAK = 0.9  # of the experts' mean: what is said in yellow


def print_evaluation(record: EvaluationRecord) -> None:
    """Print everything a record holds, part by part."""
    out = console()
    _print_scores(out, record)
    _print_recovery(out, record)
    print_functions(record)
    _print_worst_tokens(out, record.worst_tokens)
    _print_generations(out, record)
    for command in record.commands:
        out.print(f"Also run: {command}", style="dim")


def print_functions(record: EvaluationRecord) -> None:
    """Print what the merge did to predictions and activations."""
    out = console()
    _print_distances(out, record)
    _print_objectives(out, record)
    _print_collapse(out, record.collapse())


def _print_scores(out: Console, record: EvaluationRecord) -> None:
    names = list(dict.fromkeys(name for score in record.scores for name in score.metrics))
    if "perplexity" in names:
        names.remove("loss")  # its logarithm
    domains = record.domains
    for name in names:
        heading, form = _METRICS.get(name, (name.replace("_", " ").capitalize(), "{:.4g}"))
        values = {(s.model, s.domain): s.metrics[name] for s in record.scores if name in s.metrics}
        table = _table("model", *domains, *(["mean"] if name == "perplexity" and len(domains) > 1 else []))
        models = [model for model in record.models if any(m == model for m, _ in values)] or [MERGED]
        for model in sorted(models, key=lambda model: model == MERGED):  # stable: the merged model last
            row = [values.get((model, domain)) for domain in domains]
            cells = [_written(value, form) for value in row]
            if name == "perplexity" and len(domains) > 1:
                cells.append(_written(_geometric_mean(row), form))
            table.add_row(model, *cells, style="bold" if model == MERGED else None)
        counts = {s.domain: s.n_tokens or s.n_samples for s in record.scores}
        unit = "tokens" if any(s.n_tokens for s in record.scores) else "samples"
        _print(out, f"{heading}, {sum(counts.values()):,} {unit}", table)
        if name == "perplexity" and len(domains) > 1:
            out.print("mean: geometric mean over the texts", style="dim")


def _print_recovery(out: Console, record: EvaluationRecord) -> None:
    rows = [row for row in record.recovery if row.model == MERGED]
    if not rows:
        return
    table = _table("expert", "on", "its gain", "kept", "share")
    for row in rows:
        share = "–" if row.share is None else f"{row.share:.0%}"
        style = "yellow" if row.share is not None and row.share < 0 else None
        table.add_row(row.expert, row.domain, f"{row.gain:+.3f}", f"{row.kept:+.3f}", share, style=style)
    _print(out, "What is kept of each expert's gain over the base, nats", table)


def _print_distances(out: Console, record: EvaluationRecord) -> None:
    if not record.distances:
        return
    table = _table("on", "from", "to", "mean", "median", "95%", "KL", "same guess")
    # Below the merged model's rows the yardstick: how far apart the experts are themselves.
    rows = [row for row in record.distances if row.model == MERGED or {row.model, row.other} <= {*record.experts}]
    rows.sort(key=lambda row: (record.domains.index(row.domain), row.model != MERGED))
    for number, row in enumerate(rows):
        is_last = number + 1 == len(rows) or rows[number + 1].domain != row.domain
        spread = (row.fisher_rao.mean, row.fisher_rao.median, row.fisher_rao.p95)
        table.add_row(
            row.domain if number == 0 or rows[number - 1].domain != row.domain else "",
            row.model,
            row.other,
            *(f"{value:.3g}" for value in spread),
            f"{row.kl_other_model:.3g}",
            f"{row.top1_agreement:.0%}",
            style=None if row.model == MERGED else "dim",
            end_section=is_last,
        )
    _print(out, "Distance of predictions (Fisher-Rao, radians; 0 is the same, 3.14 nothing in common)", table)
    error = max(row.error for row in record.distances)
    note = "KL: from the right model to the left one, nats"
    out.print(f"{note}; means are right to {error:.1g} rad" if error else f"{note}; distances are exact", style="dim")


def _print_objectives(out: Console, record: EvaluationRecord) -> None:
    if not record.objectives:
        return
    table = _table("on", "this merge", "lowest possible", "to the barycentre")
    for row in record.objectives:
        table.add_row(row.domain, f"{row.value:.4g}", f"{row.lowest:.4g}", f"{row.to_barycentre.mean:.3g} rad")
    _print(out, "The objective: weighted mean of squared distances to the experts (rad², Eq. 3)", table)
    out.print("lowest possible: of predictions that lie at the experts' barycentre, token by token", style="dim")


def _print_collapse(out: Console, layers: Sequence[CollapseRatio]) -> None:
    if not layers:
        return
    table = _table("layer", "activation variance", "effective rank")
    worst = sorted(layers, key=lambda row: _ascending(row.effective_rank))[:N_WORST_LAYERS]
    worst += sorted(layers, key=lambda row: _ascending(row.activation_variance))[:1]
    for row in sorted(set(worst), key=lambda row: row.layer):
        table.add_row(str(row.layer), _ratio(row.activation_variance), _ratio(row.effective_rank))
    table.add_section()
    means = [
        math.fsum(values) / len(layers) for values in zip(*((x.activation_variance, x.effective_rank) for x in layers))
    ]
    table.add_row(f"mean of {len(layers)}", *map(_ratio, means))
    _print(out, "Activations over the experts' mean (1: as varied as theirs), weakest layers", table)


def _print_worst_tokens(out: Console, tokens: Iterable[WorstToken]) -> None:
    worst = sorted(tokens, key=lambda row: -row.distance)[:N_WORST_TOKENS]
    if not worst:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("where the text goes on with [token]", ratio=1)
    for heading in ("expert", "it says", "merged says", "rad"):
        table.add_column(heading, justify="right" if heading == "rad" else "left", overflow="fold")
    for row in worst:
        context = _one_line(row.context)[-_CONTEXT_CHARS:]
        table.add_row(
            Text.assemble((f"…{context}", "dim"), (f"[{_one_line(row.token)}]", "bold")),
            row.expert,
            f"{_one_line(row.expert_guess)} {row.expert_probability:.0%}",
            f"{_one_line(row.merged_guess)} {row.merged_probability:.0%}",
            f"{row.distance:.2f}",
        )
    _print(out, "Tokens on which it is farthest from an expert", table)
    out.print("says: its first guess, and the probability it gives the token of the text", style="dim")


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
            text = _one_line(row.text)
            table.add_row(row.model, text, f"{row.repetition:.0%}", style="bold" if row.model == MERGED else None)
        _print(out, f"After a passage of {domain} that ends …{_one_line(prompt)[-_CONTEXT_CHARS:]}", table)


def _table(first: str, *others: str) -> Table:
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


def _written(value: float | None, form: str) -> str:
    """Write a number; what JSON could not hold was not finite."""
    return "–" if value is None or math.isnan(value) else form.format(value)


def _geometric_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and 0 < value < math.inf]
    return math.exp(math.fsum(map(math.log, known)) / len(known)) if len(known) == len(values) else None


def _ratio(value: float) -> Text:
    weak = not value >= _WEAK
    return Text("–" if math.isnan(value) else f"{value:.3f}", style="yellow" if weak else "")


def _ascending(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _one_line(text: str) -> str:
    """Show breaks and spaces of a token, which may be nothing else."""
    shown = text.replace("\r", "").replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip() else shown.replace(" ", "␣")
