"""Select the files a push uploads, and check that they are complete and contain nothing private."""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from hf_frmerge.checkpoints.adapters.config import CONFIG_NAME as ADAPTER_CONFIG
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.lock import refuse_while_merging
from hf_frmerge.checkpoints.source import is_hub_id
from hf_frmerge.checkpoints.tensors.shard_index import weight_map
from hf_frmerge.checkpoints.tensors.small_files import read_json
from hf_frmerge.checkpoints.tensors.writer import STAGING
from hf_frmerge.errors import HubError
from hf_frmerge.hub.card.private_paths import hide_local_paths, is_public_base
from hf_frmerge.merging.record.manifest import MANIFEST_FILE, local_sources, parts_of_path, read_manifest, read_values

_IGNORED_PATTERNS = ["_*", ".frmerge*", "checkpoint-*", ".git/*", ".cache/*", "*/.cache/*"]

# transformers writes the path a model was loaded from into configurations, and never reads it back.
_CONFIG = "config.json"
_ORIGINS = {"_name_or_path", "name_or_path"}

# Small files in which a path or a token could hide. Vocabularies are left out: "/root/" may be a token there.
_TEXT_SUFFIXES = {".json", ".html", ".md", ".jinja", ".txt", ".yml", ".yaml", ".py", ".svg"}
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"}


def check_complete(folder: Path) -> None:
    """
    Check that `folder` holds a finished merge: card, manifest, configuration and all weight files.

    Raises:
        HubError: If something is missing, naming it, or if the merge was interrupted.
        MergeError: If a merge is writing to the folder right now.
    """
    refuse_while_merging(folder)
    if not folder.is_dir():
        raise HubError(f"There is no folder {folder} to push.")
    if (folder / STAGING).exists():
        raise HubError(f"{folder} holds an interrupted merge. Finish it with `--resume`, then push.")
    if not (folder / MANIFEST_FILE).is_file():
        raise HubError(f"{folder} has no {MANIFEST_FILE}: it is not the output of a finished merge.")
    is_adapter = (folder / "adapter_config.json").is_file()
    # An adapter needs no config.json: peft loads that of its base.
    if not is_adapter and not (folder / "config.json").is_file():
        raise HubError(f"{folder} has neither config.json nor adapter_config.json, so nobody could load it.")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not is_adapter:
        weights = sorted(set(weight_map(LocalFolder(str(folder)), str(folder)).values()))
    else:
        weights = ["adapter_model.safetensors" if is_adapter else "model.safetensors"]
    missing = [name for name in weights if not (folder / name).is_file()]
    if missing:
        raise HubError(
            f"{folder} lacks {len(missing)} of {len(weights)} weight files, {missing[0]} among them. Merge again."
        )
    if not (folder / "README.md").is_file():
        raise HubError(f"{folder} has no README.md. Write the card first, with `frmerge card {folder}`.")


def check_base_is_public(folder: Path) -> None:
    """
    Check that an adapter names its base by a Hub id: with a path, nobody else could load it.

    A full model passes.

    Raises:
        HubError: If the base is named by a path; the message says how to change it.
    """
    config = folder / ADAPTER_CONFIG
    name = read_json(LocalFolder(str(folder)), config.name, str(folder)).get("base_model_name_or_path")
    if name and not is_public_base(folder, name):
        raise HubError(
            f"{ADAPTER_CONFIG} names the base model {name!r}, which is no Hub id: nobody else would find it. Merge "
            'again with the Hub id of the base (--base-model ORG/NAME, base_model="ORG/NAME"), then push.'
        )


def check_nothing_local(folder: Path, token: str | None) -> None:
    """
    Check that no outgoing text file or safetensors header contains the access token or a path of this machine.

    Raises:
        HubError: With the file and the line; the token itself is never printed.
    """
    # The parents, because a config may name a sibling of the output folder, such as an expert.
    places = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), folder.resolve().parent, folder.absolute().parent}
    manifest = read_manifest(folder)
    sources, _ = local_sources(folder, manifest)
    parts = [part for source in sources for part in parts_of_path(source)]
    places |= {Path(part).parent for part in parts if part is not None and "://" not in part}
    # Whole path prefixes only: not the middle of a URL or of a longer path.
    local = [re.compile(rf"(?<![\w./:-]){re.escape(str(place))}/") for place in places if len(place.parts) > 1]
    written = manifest.files
    for name, content in outgoing_files(folder).items():
        text = _readable_part(name, content)
        if token and token in text:
            raise HubError(f"{name} contains your access token. Take it out, and revoke the token if it was shared.")
        for pattern in local:
            match = pattern.search(text)
            if match:
                line = text.count("\n", 0, match.start()) + 1
                # The manifest has checksums of these files, so editing one here would make the push fail later.
                where = "that file of the model it came from, merge again" if name in written else "the file"
                raise HubError(
                    f"{name}, line {line}, contains a path of this machine ({match[0]}…), which would be made public. "
                    f"Take it out of {where}, then push."
                )


def _readable_part(name: str, content: Path | bytes) -> str:
    """Return the text to search for paths and tokens: small text files whole, weight files only their header."""
    path = Path(name)
    if path.suffix == ".safetensors" and isinstance(content, Path):
        with content.open("rb") as file:
            # A safetensors file starts with the header's length: 8 bytes, little endian.
            return file.read(int.from_bytes(file.read(8), "little")).decode("utf-8", errors="replace")
    if path.suffix not in _TEXT_SUFFIXES or path.name in _VOCABULARIES:
        return ""
    data = content if isinstance(content, bytes) else content.read_bytes()
    return data.decode("utf-8", errors="replace")


def outgoing_files(folder: Path) -> dict[str, Path | bytes]:
    """
    Collect the files that a push of `folder` uploads.

    Returns:
        `dict[str, Path | bytes]`: Name in the repository -> local file, or new content where the public version
        differs: configurations lose the path a model was loaded from, and in the manifest local paths become folder
        names. The local manifest keeps its paths, because `frmerge verify` finds local experts by them.
    """
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files: dict[str, Path | bytes] = {
        name: folder / name for name in filter_repo_objects(names, ignore_patterns=_IGNORED_PATTERNS)
    }
    for name in [name for name in files if name.endswith(_CONFIG)]:
        with suppress(ValueError):  # not JSON, so not what the merge wrote: `check_unaltered` reports it
            config = parse_json((folder / name).read_bytes())
            cleaned = _without_origin(config)
            if cleaned != config:
                files[name] = (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
    if MANIFEST_FILE in files:
        # On the raw JSON and not on a `Manifest`: fields that only a newer version knows are cleaned too.
        manifest = read_values(folder)
        public: Any = _hide_paths(manifest)
        # The cleaned configurations have other checksums, and the public manifest must match what is public.
        for name, content in files.items():
            if isinstance(content, bytes) and name in public["files"]:
                public["files"][name] |= {"size": len(content), "sha256": sha256(content).hexdigest()}
        if public != manifest:
            files[MANIFEST_FILE] = json.dumps(public, indent=2, ensure_ascii=False).encode()
    return files


def _without_origin(value: object) -> object:
    """Remove, at any depth, entries with the path a model or tokenizer was loaded from; Hub ids stay."""
    if isinstance(value, dict):
        return {
            key: _without_origin(item)
            for key, item in value.items()
            if key not in _ORIGINS or not isinstance(item, str) or is_hub_id(item)
        }
    return [_without_origin(item) for item in value] if isinstance(value, list) else value


def _hide_paths(value: object) -> object:
    """Shorten local paths to their last part in all strings of a JSON value, keys included."""
    if isinstance(value, dict):
        return {_hide_paths(key): _hide_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hide_paths(item) for item in value]
    return hide_local_paths(value) if isinstance(value, str) else value
