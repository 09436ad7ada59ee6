"""Model card: front matter for the Hub, and a text for readers who have never merged a model."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.hub.card.commands import (
    again_command,
    install_command,
    reproduce_command,
    reproduce_python,
    result_arguments,
    usage_python,
    verify_command,
)
from hf_frmerge.hub.card.data import TEMPLATE_FILE, CardSource, MergeCard
from hf_frmerge.hub.card.licences import LicenceDecision, SourceMetadata, combine
from hf_frmerge.hub.card.markdown import Markdown, as_markdown, cell, code, fence, hub_link
from hf_frmerge.hub.card.private_paths import hide_local_paths
from hf_frmerge.wording import parts
from hf_frmerge.wording.calibration import calibration_verdict, fitted_how
from hf_frmerge.wording.geometry import geometry_verdicts
from hf_frmerge.wording.methods import BLOCKS, NORMS, SPACES, bibtex, method_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2 import Template

    from hf_frmerge.evaluation.record import EvaluationRecord
    from hf_frmerge.hub.card.evaluation_section import EvaluationSection
    from hf_frmerge.wording.verdicts import Verdict

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
USER_BEGIN = "<!-- user:begin -->"
USER_END = "<!-- user:end -->"

# Backup of a README.md that we did not write. The leading underscore keeps it out of a push.
_SET_ASIDE = "_README.previous.md"

# Tags that the merged model inherits if any source has them.
_INHERITED_TAGS = ("not-for-all-audiences",)


def render_card(card: MergeCard, *, user_section: str = "") -> str:
    """
    Render a model card.

    Args:
        card (`MergeCard`):
            Facts of the merge.
        user_section (`str`, *optional*):
            Text between the user markers of an earlier card, kept unchanged.

    Returns:
        `str`: Content of `README.md`: YAML front matter and Markdown.
    """
    import yaml

    card = _without_local_paths(card)
    decision, method = licence_of(card), method_of(card.method)
    papers = (method.paper, card.tool_paper)
    template = compiled_template(Path(card.template_file).read_text(encoding="utf-8"))
    body = template.render(
        card=card,
        statistics=card.statistics,
        parts=parts,
        method=method,
        space=SPACES.get(card.space, ""),
        block=BLOCKS.get(card.block, card.block),
        norm=NORMS.get(card.norm, card.norm),
        settings=result_arguments(card),
        evaluation=_evaluation_section(card),
        figures={name: Markdown(f"![{parts.FIGURES[name].title}]({path})") for name, path in card.figures.items()},
        geometry=_verdicts(card),
        fitted=f", and {how}" if (how := fitted_how(card.calibration)) is not None else "",
        decision=decision,
        command=reproduce_command(card),
        python=reproduce_python(card),
        install=install_command(card),
        again=again_command(card),
        verify=verify_command(card, folder=card.model_name.rpartition("/")[2]),
        usage=usage_python(card),
        papers=[Markdown(bibtex(paper)) for paper in dict.fromkeys(papers if card.is_by_method else ()) if paper],
        user_begin=Markdown(USER_BEGIN),
        user_end=Markdown(USER_END),
        user_section=Markdown(user_section.strip("\n")),
    )
    front = yaml.dump(front_matter(card), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{body.strip()}\n"


@cache
def compiled_template(text: str) -> Template:
    """Compile a template, which is most of a card's time; the part on an evaluation only where there is one."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(TEMPLATE_FILE).parent),
        optimized=False,  # no constants are looked for to fold
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Markdown: what is not Markdown already is escaped for that
        finalize=as_markdown,
    )
    environment.filters |= {"cell": cell, "code": code, "fence": fence, "hub_link": hub_link, "as_it_is": Markdown}
    return environment.from_string(text)


def _verdicts(card: MergeCard) -> list[Verdict]:
    """Return what is found without an evaluation: what the fit to the experts gained, then the geometry."""
    fitted = [calibration_verdict(card.calibration)] if card.calibration is not None else []
    return fitted + (geometry_verdicts(card.statistics.geometry) if card.statistics.geometry else [])


def write_card(card: MergeCard, output_dir: Path | str, keep_user_sections: bool = True) -> Path:
    """
    Write `README.md` into `output_dir`, keeping the user's text between the markers of an earlier card.

    A `README.md` without the markers was not written by this function. It is renamed to `_README.previous.md`, which
    a push leaves out.

    Args:
        card (`MergeCard`):
            Facts of the merge.
        output_dir (`Path` or `str`):
            Folder of the merged model.
        keep_user_sections (`bool`, *optional*, defaults to `True`):
            Whether to keep the user section of an existing card.

    Returns:
        `Path`: Path of the card.
    """
    path = Path(output_dir) / CARD_NAME
    user_section = ""
    if keep_user_sections and path.is_file():
        kept_text = read_user_section(path.read_text(encoding="utf-8"))
        if kept_text is None:
            logger.warning("%s is not one of our cards: it is kept as %s.", CARD_NAME, _SET_ASIDE)
            path.replace(path.with_name(_SET_ASIDE))
        else:
            user_section = kept_text
    write_file(path, render_card(card, user_section=user_section))
    return path


def has_own_card(output_dir: Path | str) -> bool:
    """Whether the `README.md` in `output_dir` was written by `write_card`."""
    path = Path(output_dir) / CARD_NAME
    return path.is_file() and read_user_section(path.read_text(encoding="utf-8")) is not None


def read_user_section(text: str) -> str | None:
    """
    Return the text between the user markers; `None` if a marker is missing or they are in the wrong order.

    A marker has a line of its own: no name or text of others in a card begins a line with one.
    """
    match = re.search(f"^{re.escape(USER_BEGIN)}$(.*)^{re.escape(USER_END)}$", text, re.DOTALL | re.MULTILINE)
    return match[1].strip("\n") if match else None


def licence_of(card: MergeCard) -> LicenceDecision:
    """Decide the licence of the merged model: the one the user chose, else by the rule of `licences.combine`."""
    decision = combine([(source.name, source.metadata) for source in card.parts])
    if card.licence is not None:
        reason = f"The person who made this merge chose `{card.licence}` for it."
        return replace(
            decision, licence=card.licence, licence_name=None, licence_link=None, conflict=False, reason=reason
        )
    if decision.licence_link and not re.match(r"https?://", decision.licence_link):
        # A link such as "LICENSE" is relative to the source's card and would be broken in ours.
        origin = next((source for source in card.parts if source.repo_id is not None), None)
        link = f"https://huggingface.co/{origin.repo_id}/blob/{origin.commit or 'main'}/" if origin else None
        decision = replace(decision, licence_link=link and link + decision.licence_link)
    return decision


def front_matter(card: MergeCard) -> dict[str, Any]:
    """
    Build the front matter of the card in the Hub's vocabulary, as its client orders it.

    It is no `ModelCardData`, whose import takes as long as all that a small merge computes.

    Args:
        card (`MergeCard`):
            Facts of the merge.

    Returns:
        `dict[str, Any]`: `base_model` holds Hub ids only. A full model is a `merge` of its experts, and of the base if
        deltas were merged. A merged adapter stays an `adapter` of its base: with its experts as `base_model`, the
        Hub would show it as a merge of adapters.
    """
    decision = licence_of(card)
    parents = card.parts if card.output_kind == "full" else [s for s in card.sources if s.role == "base"]
    base_model = _unique([source.repo_id for source in parents])
    relation = "merge" if card.output_kind == "full" else "adapter"
    languages = [language for source in card.parts for language in source.metadata.language]
    datasets = [dataset for source in card.parts for dataset in source.metadata.datasets if _is_id(dataset)]
    of_method = method_of(card.method).tags if card.is_by_method else ()
    tags = [*card.tag_names, *of_method, *card.task.tags, *card.tags]
    tags += [tag for tag in _INHERITED_TAGS if any(tag in source.metadata.tags for source in card.parts)]
    values = {
        "base_model": base_model,
        "datasets": _unique(datasets),
        "language": _unique(languages),
        "library_name": "peft" if card.output_kind == "adapter" else card.task.library_name,
        "license": decision.licence,
        "license_name": decision.licence_name,
        "license_link": decision.licence_link,
        "pipeline_tag": card.task.pipeline_tag,
        "tags": _unique(tags),
        "base_model_relation": relation if base_model else None,
        "model-index": _model_index(card),
    }
    return {name: value for name, value in values.items() if value}


def _without_local_paths(card: MergeCard) -> MergeCard:
    """Return a copy of `card` in which local paths are shortened to their last part in all free text."""

    def hide(text: str) -> str:
        return hide_local_paths(text, card.parts)

    return replace(
        card,
        sources=[_public_source(source) for source in card.sources],
        evaluation=_without_names(card.evaluation, hide),
        notes=[hide(note) for note in card.notes],
        model_name=hide(card.model_name).removeprefix("./"),
        command=reproduce_command(card),
        python=reproduce_python(card),
        non_default_arguments=result_arguments(card),
    )


def _public_source(source: CardSource) -> CardSource:
    """Return a copy of `source` without the local paths in its spec and licence link."""
    metadata: SourceMetadata = source.metadata
    link = metadata.licence_link
    return replace(
        source,
        spec=source.parts[0].name,
        adapter=_public_source(source.adapter) if source.adapter is not None else None,
        metadata=replace(metadata, licence_link=hide_local_paths(link) if link else None),
    )


def _is_id(dataset: str) -> bool:
    """Whether a `datasets` entry can be a Hub id; some cards have paths or URLs there, which the Hub rejects."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) is not None


# Most merges are described before anything is measured, and what tells of measurements takes as long to import as a
# tenth of a small merge.


def _evaluation_section(card: MergeCard) -> EvaluationSection | None:
    if card.evaluation is None:
        return None
    from hf_frmerge.hub.card.evaluation_section import evaluation_section

    return evaluation_section(card.evaluation)


def _model_index(card: MergeCard) -> list[dict[str, Any]]:
    if card.evaluation is None:
        return []
    from hf_frmerge.hub.card.model_index import model_index

    return model_index(card.evaluation, card.model_name, card.task.pipeline_tag)


def _without_names(evaluation: EvaluationRecord | None, hide: Callable[[str], str]) -> EvaluationRecord | None:
    if evaluation is None:
        return None
    from hf_frmerge.hub.card.evaluation_section import hide_names

    return hide_names(evaluation, hide)


def _unique(items: list[Any]) -> list[str]:
    """Drop `None` and repeated items; the order of first occurrence is kept."""
    return list(dict.fromkeys(item for item in items if item is not None))
