"""HTML page about a merge in a single file: it needs no network, fonts or images."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hf_frmerge.checkpoints.disk import make_folder, write_file
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, Generation, WorstToken
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.record.manifest import REPORT_FILE
from hf_frmerge.report.facts import MergeFacts, read_facts
from hf_frmerge.report.figures import draw_figures
from hf_frmerge.report.html import inline_figures, render
from hf_frmerge.report.tables import block_table, distance_table, layer_table, objective_table, score_tables
from hf_frmerge.report.verdicts import verdicts
from hf_frmerge.wording import parts
from hf_frmerge.wording.geometry import NOTHING_MERGED, unmeasured
from hf_frmerge.wording.methods import method_of

_MAX_TOKENS = 200
_CONTEXT = 160  # characters shown before a token


def write_page(folder: Path | str, output: Path | str | None = None) -> Path:
    """
    Write the HTML report of the merge in `folder`.

    Args:
        folder (`Path` or `str`):
            Folder of a merge, with or without the record of an evaluation.
        output (`Path` or `str`, *optional*):
            File to write; `merge_report.html` in the folder by default.

    Returns:
        `Path`: Path of the page.

    Raises:
        CheckpointError: If the folder holds no finished merge.
        MergeError: If matplotlib is not installed.
    """
    page = render_page(read_facts(folder))
    path = Path(folder) / REPORT_FILE if output is None else Path(output)
    make_folder(path.parent)
    write_file(path, page)
    return path


def render_page(facts: MergeFacts) -> str:
    """
    Render the page as HTML. The same records give the same text, byte for byte.

    Raises:
        MergeError: If matplotlib is not installed.
    """
    record = facts.record or EvaluationRecord()  # an empty record makes all tables empty, and the template simpler
    tables = {
        "distance_table": distance_table(record),
        "layer_table": layer_table(record),
        "block_table": block_table(facts),
    }
    of_scores = score_tables(record)
    return render(
        "page.html.jinja",
        title=f"{facts.name}: what the merge did",
        name=facts.name,
        lead=f"What a merge of {len(facts.experts)} models did, to the weights and to what they compute.",
        facts=facts,
        method=method_of(facts.manifest.method),
        record=facts.record,
        verdicts=verdicts(facts),
        figures=inline_figures(lambda width: draw_figures(facts, width)),
        figure_parts=parts.FIGURES,
        parts=parts,
        score_tables=of_scores,
        objective_table=objective_table(record),
        **tables,
        tables=[*of_scores, *filter(None, tables.values())],
        unmeasured=unmeasured(facts.manifest.method) if facts.merged_tensors else NOTHING_MERGED,
        has_coefficients=COEFFICIENTS_FILE in facts.manifest.files,
        worst_tokens=_worst_tokens(record),
        n_worst_tokens=len(record.worst_tokens),
        generations=list(_generations(record)),
        evaluate_command=_evaluate_command(facts),
    )


@dataclass(frozen=True)
class Prompt:
    """Continuations of one prompt by all models, the merged model first."""

    domain: str
    text: str
    answers: list[Generation]


def _worst_tokens(record: EvaluationRecord) -> list[WorstToken]:
    """Select the tokens with the largest distances, at most 200, with a shortened context."""
    worst = sorted(record.worst_tokens, key=lambda token: -token.distance)[:_MAX_TOKENS]
    return [replace(token, context=_end_of(token.context)) for token in worst]


def _end_of(context: str) -> str:
    """Keep the last 160 characters of a context."""
    return context if len(context) <= _CONTEXT else f"…{context[-_CONTEXT:]}"


def _generations(record: EvaluationRecord) -> Iterator[Prompt]:
    """Group continuations by prompt: the merged model first, then the experts, then the others."""
    order = {name: index for index, name in enumerate([MERGED, *record.experts])}
    for domain, prompt in dict.fromkeys((row.domain, row.prompt) for row in record.generations):
        answers = [row for row in record.generations if (row.domain, row.prompt) == (domain, prompt)]
        yield Prompt(domain, prompt, sorted(answers, key=lambda row: order.get(row.model, len(order))))


def _evaluate_command(facts: MergeFacts) -> str:
    """Return a command that evaluates this merge. Local models appear by name, without a path."""
    experts = [part for expert in facts.manifest.experts for part in ("--experts", expert.name)]
    base = facts.manifest.base_model
    parts = ["frmerge", "evaluate", facts.name, *experts, *(["--base-model", base.id] if base else [])]
    return shlex.join([*parts, "--data", "heldout.txt"])
