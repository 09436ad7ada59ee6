"""Read the metadata of the sources' cards (licence, languages, datasets), and decide the licence of a merge.

Nothing is guessed: a licence that all sources share is kept; otherwise the field stays empty and the card lists the
licence of each source. This is bookkeeping, not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.errors import MergeError
from hf_frmerge.visible import visible
from hf_frmerge.wording.numbers import listed

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan

_NO_DERIVATIVES = re.compile(r"(^|-)nd(-|$)")

# BibTeX entries in a fenced code block, as model cards have them.
_BIBTEX = re.compile(r"^```(?:bibtex|bib|latex|tex)?[ \t]*\r?\n\s*(@\w+\s*\{[^`]*)```", re.MULTILINE | re.IGNORECASE)
_LONGEST_CITATION = 4000  # characters; a card that cites a whole bibliography is linked instead

# Pattern of the licence id -> condition for derived models. The ids are those in the Hub's list of licences.
_CONDITIONS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(^|-)nc(-|$)|noncommercial"), "forbids commercial use"),
    (re.compile(r"(^|-)sa(-|$)"), "asks that derived works be shared under the same licence"),
    (re.compile(r"^(a|l)?gpl|^gfdl"), "is copyleft: derived works must be offered under it"),
    (re.compile(r"^llama"), "has naming, attribution and use conditions for derived models"),
    (re.compile(r"^gemma$"), "passes its use restrictions on to derived models"),
    (re.compile(r"rail"), "passes its use restrictions on to derived models"),
    (re.compile(r"research|^apple-amlr$|^deepfloyd"), "limits use to research"),
    (re.compile(r"^other$"), "is a licence of its own: read its text"),
)


@dataclass(frozen=True)
class SourceMetadata:
    """Metadata in the README of one source; fields it does not set are empty."""

    licence: str | None = None  # identifier in lower case; several are joined by ", "
    licence_name: str | None = None  # with licence "other"
    licence_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    citation: str | None = None  # BibTeX entries in the card


@dataclass(frozen=True)
class LicenceDecision:
    """Licence of a merged model, with what a reader needs to check it."""

    licence: str | None  # None: cannot be decided
    licence_name: str | None
    licence_link: str | None
    conflict: bool  # the sources disagree, or at least one names none
    reason: str  # one sentence for the card
    refusals: tuple[str, ...]  # sources whose licence forbids derived works and that the user did not allow
    flags: tuple[str, ...]  # sentences on conditions that apply to the merged model
    table: tuple[tuple[str, SourceMetadata], ...]  # (name of the source, metadata of its card)

    def raise_if_refused(self) -> None:
        """
        Raise unless every source allows derived works.

        Raises:
            MergeError: If a source's licence forbids derivatives and `allow_license` does not name it.
        """
        if not self.refusals:
            return
        licences = {name: metadata.licence for name, metadata in self.table}
        listed = ", ".join(f"{name} ({licences[name]})" for name in self.refusals)
        raise MergeError(
            f"A merge is a derived work, and the licence of {listed} does not allow derived works. Leave it out, or, "
            f"if you have the right to, allow it by name: `--allow-license {licences[self.refusals[0]]}`."
        )


def read_source_metadata(folder: Path | str) -> SourceMetadata:
    """
    Read the front matter of a source's `README.md` (licence, languages, datasets, tags), and its citation.

    Args:
        folder (`Path` or `str`):
            Folder or URL of the source: a checkpoint, an adapter, or a snapshot of a Hub repository.

    Returns:
        `SourceMetadata`: Empty if there is no `README.md` or no front matter, or if it is not valid YAML. The licence
        then counts as not given.
    """
    source_folder = open_folder(str(folder))
    if not source_folder.exists("README.md"):
        return SourceMetadata()
    # "utf-8-sig" drops a byte order mark, which would hide the front matter.
    text = source_folder.read("README.md").decode("utf-8-sig", errors="replace")
    citation = "\n\n".join(entry.strip() for entry in _BIBTEX.findall(text)) or None
    data = _front_matter(text)
    licences = tuple(licence.lower() for licence in _strings(data.get("license")))
    return SourceMetadata(
        licence=", ".join(licences) or None,
        licence_name=", ".join(_strings(data.get("license_name"))) or None,
        licence_link=", ".join(_strings(data.get("license_link"))) or None,
        language=_strings(data.get("language")),
        datasets=_strings(data.get("datasets")),
        tags=_strings(data.get("tags")),
        citation=citation if citation is None or len(citation) <= _LONGEST_CITATION else None,
    )


def _front_matter(text: str) -> dict[str, Any]:
    """Parse the YAML at the start of a README; empty if there is none or it is not a valid mapping."""
    import yaml

    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError:  # a mistake in a third party's card must not stop the merge; the licence stays unknown
        return {}
    return data if isinstance(data, dict) else {}


def combine(sources: Sequence[tuple[str, SourceMetadata]], *, allowed: Collection[str] = ()) -> LicenceDecision:
    """
    Decide the licence of a merge of `sources`.

    Args:
        sources (`Sequence[tuple[str, SourceMetadata]]`):
            Name and metadata of every source: the experts and, if there is one, the base model.
        allowed (`Collection[str]`, *optional*):
            Identifiers of no-derivatives licences that the user explicitly allowed.

    Returns:
        `LicenceDecision`: The common licence if all sources name the same one, else none; with the reason.
    """
    identities = {_identity(metadata) for _, metadata in sources}
    silent = [name for name, m in sources if m.licence in (None, "unknown")]
    several = [name for name, m in sources if "," in (m.licence or "")]
    licence, licence_name, licence_link = next(iter(identities)) if len(identities) == 1 else (None, None, None)
    if silent:
        reason = f"No licence is given for {listed(silent)}, so none is claimed for this model."
    elif several:
        reason = f"More than one licence is given for {listed(several)}, so none is chosen for this model."
    elif len(identities) > 1:
        reason = "The sources carry different licences, so none is claimed for this model."
    else:
        reason = f"Every source is under `{licence_name or licence}`, and so is this model."
    conflict = bool(silent or several or len(identities) != 1)
    permitted = {identifier.lower() for identifier in allowed}
    return LicenceDecision(
        licence=None if conflict else licence,
        licence_name=None if conflict else licence_name,
        licence_link=None if conflict else licence_link,
        conflict=conflict,
        reason=reason,
        refusals=tuple(name for name, m in sources if _forbids_derivatives(m) and m.licence not in permitted),
        flags=tuple(_flags(sources)),
        table=tuple(sources),
    )


def licences_of_plan(plan: MergePlan) -> LicenceDecision:
    """Decide the licence for the models of a plan, from their cards and `allow_license`."""
    # Cards are read from local folders and the Hub only, not from behind other URLs.
    parts = [part for model in plan.models for part in model.source.parts]
    readable = [part for part in parts if "://" not in part.path or part.path.startswith("hub://")]
    allowed = [licence.strip() for licence in (plan.args.allow_license or "").split(",")]
    return combine([(part.spec, read_source_metadata(part.path)) for part in readable], allowed=allowed)


def _identity(metadata: SourceMetadata) -> tuple[str | None, str | None, str | None]:
    """Return the key licences are compared by: the identifier; for "other", also the name and link."""
    if metadata.licence == "other":
        return metadata.licence, metadata.licence_name, metadata.licence_link
    return metadata.licence, None, None


def _forbids_derivatives(metadata: SourceMetadata) -> bool:
    return any(_NO_DERIVATIVES.search(part) for part in (metadata.licence or "").split(", "))


def _flags(sources: Sequence[tuple[str, SourceMetadata]]) -> list[str]:
    """Return one sentence per licence with its conditions, naming the sources that have it."""
    holders: dict[str, list[str]] = {}
    for name, metadata in sources:
        for part in (metadata.licence or "").split(", "):
            if part:
                holders.setdefault(part, []).append(name)
    sentences = []
    for part, names in holders.items():
        asks = [condition for pattern, condition in _CONDITIONS if pattern.search(part)]
        if _NO_DERIVATIVES.search(part):
            asks.insert(0, "does not allow derived works such as this merge")
        if asks:
            sentences.append(f"`{part}` ({listed(names)}) {' and '.join(asks)}.")
    return sentences


def _strings(value: object) -> tuple[str, ...]:
    """Return a front matter field, a value or a list, as strings. `no` (Norwegian) is lost: YAML reads it as false."""
    values = value if isinstance(value, list) else [value]
    return tuple(visible(item.strip()) for item in values if isinstance(item, str) and item.strip())
