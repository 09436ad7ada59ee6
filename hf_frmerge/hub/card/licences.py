"""What the sources' own cards say (licence, languages, datasets), and which licence a merge of them may carry.

The rule is to never guess: one licence shared by every source is kept; anything else leaves the field empty and the
card lists what each source says. This is bookkeeping, not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.errors import MergeError
from hf_frmerge.wording.numbers import listed

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan

_NO_DERIVATIVES = re.compile(r"(^|-)nd(-|$)")

# Entries in a code block of their own, as model cards give them.
_BIBTEX = re.compile(r"^```(?:bibtex|bib|latex|tex)?[ \t]*\r?\n\s*(@\w+\s*\{[^`]*)```", re.MULTILINE | re.IGNORECASE)
_LONGEST_CITATION = 4000  # characters; a card that cites a whole bibliography is linked instead

# Licence id pattern -> what it asks of a derived model. Ids: the Hub's list of licence identifiers.
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
    """What the README of one source says; empty where it says nothing."""

    licence: str | None = None  # identifier, lower case; several, if a card names several: joined by ", "
    licence_name: str | None = None  # with licence "other"
    licence_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    citation: str | None = None  # BibTeX entries its card asks to be cited by


@dataclass(frozen=True)
class LicenceDecision:
    """Licence a merge may carry, and everything a person needs to judge it."""

    licence: str | None  # None: not to be guessed
    licence_name: str | None
    licence_link: str | None
    conflict: bool  # the sources disagree, or at least one does not say
    reason: str  # one sentence for the card
    refusals: tuple[str, ...]  # sources whose licence forbids derived works and was not allowed by the person
    flags: tuple[str, ...]  # sentences on conditions that reach the merged model
    table: tuple[tuple[str, SourceMetadata], ...]  # (name of the source, what its card says)

    def raise_if_refused(self) -> None:
        """
        Stop unless every source allows derived works.

        Raises:
            MergeError: If the licence of a source forbids derivatives and was not allowed explicitly.
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
    Read licence, languages, datasets and tags from the front matter of `README.md` of a source, and its citation.

    Args:
        folder (`Path` or `str`):
            Folder of the source: a checkpoint, an adapter, a snapshot of a Hub repository, or its URL.

    Returns:
        `SourceMetadata`: Empty if there is no `README.md`, no front matter, or one that is not valid YAML: a source
        that cannot be read says nothing, and nothing is guessed for it.
    """
    opened = open_folder(str(folder))
    if not opened.exists("README.md"):
        return SourceMetadata()
    text = opened.read("README.md").decode("utf-8-sig", errors="replace")
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
    """Parsed YAML at the start of a README; empty if there is none that makes sense."""
    import yaml

    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError:  # someone else's card: its mistake must not stop the merge, and leaves the licence unknown
        return {}
    return data if isinstance(data, dict) else {}


def combine(sources: Sequence[tuple[str, SourceMetadata]], *, allowed: Collection[str] = ()) -> LicenceDecision:
    """
    Decide which licence a merge of `sources` may carry.

    Args:
        sources (`Sequence[tuple[str, SourceMetadata]]`):
            Name and metadata of every source: the experts and, if one takes part, the base model.
        allowed (`Collection[str]`, *optional*):
            Licence identifiers without derivatives that the person explicitly takes responsibility for.

    Returns:
        `LicenceDecision`: The common licence if all sources name the same one, else none, with reasons.
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
    """Decide for the models of a plan, from their cards on this machine and `allow_license`."""
    readable = [m for m in plan.models if "://" not in m.source.path or m.source.path.startswith("hub://")]
    allowed = [licence.strip() for licence in (plan.args.allow_license or "").split(",")]
    return combine([(model.spec, read_source_metadata(model.source.path)) for model in readable], allowed=allowed)


def _identity(metadata: SourceMetadata) -> tuple[str | None, str | None, str | None]:
    """Two licences called "other" are the same only if their name and link are; elsewhere the identifier decides."""
    if metadata.licence == "other":
        return metadata.licence, metadata.licence_name, metadata.licence_link
    return metadata.licence, None, None


def _forbids_derivatives(metadata: SourceMetadata) -> bool:
    return any(_NO_DERIVATIVES.search(part) for part in (metadata.licence or "").split(", "))


def _flags(sources: Sequence[tuple[str, SourceMetadata]]) -> list[str]:
    """One sentence a licence and condition, naming the sources it comes from."""
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
    """Front matter fields may be one value or a list; YAML reads `no` (Norwegian) as false, which is dropped."""
    values = value if isinstance(value, list) else [value]
    return tuple(item.strip() for item in values if isinstance(item, str) and item.strip())
