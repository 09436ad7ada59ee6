"""Resolve what a user wrote to a checkpoint: a local folder, an fsspec URL, or a Hub id pinned to one commit."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.source import GGUF_SUFFIX, Source, check_name, gguf_source, is_on_hub, source_of
from hf_frmerge.errors import CheckpointError, HubError
from hf_frmerge.visible import without_secrets

__all__ = ["Source", "fetch_all", "resolve", "resolve_all"]

_LOCAL_URL = re.compile(r"(?:file|local)://(?=/)")
_ONE_MODEL = (
    "{spec!r} is a model with an adapter on it, which a merge takes as one expert, but nothing else does. Fold the "
    "adapter in first (`frmerge merge {adapter} --base-model {base} --output-dir folded`), and pass 'folded'."
)
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^@\s]+))?", re.ASCII)


def resolve(
    spec: str,
    *,
    token: str | bool | None = None,
    download: bool = True,
    extra: Sequence[str] = (),
    allow_pickle: bool = False,
) -> Source:
    """
    Find the checkpoint a user means, downloading it from the Hub if need be.

    Args:
        spec (`str`):
            Local folder or GGUF file, fsspec URL (`s3://bucket/model`), or Hub id (`org/name`, `name`,
            `org/name@revision`).
        token (`str` or `bool`, *optional*):
            Hub token; by default the one `hf auth login` stored, `False` for none.
        download (`bool`, *optional*, defaults to `True`):
            Fetch the files of a Hub id that are not in the cache. If `False`, the path of such a checkpoint is
            `hub://org/name@commit`, to be read by ranges.
        extra (`Sequence[str]`, *optional*):
            Patterns of files to fetch from the Hub besides those a merge reads.
        allow_pickle (`bool`, *optional*, defaults to `False`):
            Take pickles for weights where there is nothing else.

    Returns:
        `Source`: Folder, kind, and for a Hub id the commit.

    Raises:
        CheckpointError: If there is no such folder, or it holds no weights that may be read.
        HubError: If the Hub cannot be reached or refuses, or the disk is too small for a download.
    """
    spec = str(spec)
    local = _LOCAL_URL.sub("", spec)
    if "://" in local:
        shown = without_secrets(spec)
        return source_of(open_folder(local), shown, local, allow_pickle=allow_pickle)
    check_name(local)
    path = Path(local).expanduser()
    # A local folder goes before a Hub id of the same name, as in `from_pretrained`.
    if path.is_dir():
        return source_of(LocalFolder(str(path)), spec, str(path), allow_pickle=allow_pickle)
    if path.suffix == GGUF_SUFFIX and path.is_file():
        return gguf_source(path, spec)
    if path.exists():
        raise CheckpointError(f"{spec!r} is a file. Pass the folder that holds it, with its config.json.")
    hub_id = _HUB_ID.fullmatch(spec)
    if hub_id is None or spec.startswith((".", "~")):
        pair = split_pair(spec)
        if pair is not None:
            raise CheckpointError(_ONE_MODEL.format(spec=spec, base=quote(pair[0]), adapter=quote(pair[1])))
        raise CheckpointError(f"There is no folder {spec!r} (looked for {path.absolute()}).")
    from hf_frmerge.checkpoints.hub.find import fetch, find

    source = find(spec, hub_id["repo"], hub_id["revision"], token, extra, allow_pickle=allow_pickle)
    return fetch([source], token, extra)[0] if download else source


def resolve_all(
    specs: Iterable[str],
    *,
    token: str | bool | None = None,
    download: bool = True,
    allow_pickle: bool = False,
    pairs: bool = False,
) -> list[Source]:
    """
    Resolve each spec, in order. A spec listed twice is looked up once; all are looked up before any download.

    Args:
        specs (`Iterable[str]`):
            As for `resolve`.
        token, download, allow_pickle:
            As for `resolve`.
        pairs (`bool`, *optional*, defaults to `False`):
            Accept `base+adapter`, a full model with an adapter on it.
    """
    find_one = functools.partial(resolve, token=token, download=False, allow_pickle=allow_pickle)
    resolved: dict[str, Source] = {}
    sources = []
    for spec in specs:
        if spec not in resolved:
            pair = split_pair(spec) if pairs else None
            resolved[spec] = _find_pair(spec, pair, find_one) if pair else find_one(spec)
        sources.append(resolved[spec])
    return fetch_all(sources, token=token) if download else sources


def split_pair(spec: str) -> tuple[str, str] | None:
    """Return model and adapter of `base+adapter`; None of other names, and of folders that have a plus in theirs."""
    if Path(spec).expanduser().exists() or "://" in spec:
        return None
    pairs = [(spec[:place], spec[place + 1 :]) for place, letter in enumerate(spec) if letter == "+"]
    pairs = [(base, adapter) for base, adapter in pairs if base and adapter]
    found = [pair for pair in pairs if all(Path(name).expanduser().is_dir() for name in pair)]
    return next(iter(found or pairs), None)


def _find_pair(spec: str, pair: tuple[str, str], find_one: Callable[[str], Source]) -> Source:
    """Return a model that is to be read with an adapter on it."""
    try:
        base, adapter = map(find_one, pair)
    except (CheckpointError, HubError) as error:  # neither name is what the user wrote
        raise type(error)(
            f"{spec!r} is read as the model {pair[0]!r} with the adapter {pair[1]!r}. {error}"
        ) from error
    if (base.kind, adapter.kind) != ("full", "adapter"):
        raise CheckpointError(
            f"{spec!r}: expected a full model and an adapter on it, but {base.spec!r} is "
            f"{'an adapter' if base.kind == 'adapter' else 'a full model'} and {adapter.spec!r} is "
            f"{'an adapter' if adapter.kind == 'adapter' else 'a full model'}. Name models to be merged one by one, "
            "with a space between."
        )
    return replace(base, spec=spec, adapter=adapter)


def fetch_all(sources: Sequence[Source], *, token: str | bool | None = None) -> list[Source]:
    """Download the sources that are on the Hub and not on this machine; the others are returned unchanged."""
    if not any(is_on_hub(source) for source in sources):  # local merges do not import the Hub's client
        return list(sources)
    from hf_frmerge.checkpoints.hub.find import fetch

    return fetch(sources, token)
