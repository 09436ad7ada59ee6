"""Find where the models of a merge disagree about configs, vocabularies and chat templates, and say which is taken."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from hf_frmerge.checkpoints.beside.donor import CONFIG_FILE
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.checkpoints.tensors.small_files import read_file, read_json
from hf_frmerge.checkpoints.vocabularies.choice import TokenChoice
from hf_frmerge.checkpoints.vocabularies.tokenizer_file import moved_tokens, parse_tokenizer
from hf_frmerge.errors import CheckpointError

# Keys that do not affect what a model computes: names, versions, and dtypes (which alignment reports).
_IGNORED_KEYS = {"_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "use_cache"}
# Keys that are reported even if one config leaves them to the default of its transformers version.
_IMPORTANT_PARTS = (
    "rope",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

_OF_TOKENS = re.compile(r"(^|\.)(vocab_size|.+_token_ids?|.+_token_index)$")

_ABSENT = "not given"


def find_disagreements(sources: Sequence[Source], choice: TokenChoice | None = None) -> list[str]:
    """
    Describe where configs, tokenizers and chat templates differ, and which one the output takes.

    Args:
        sources (`Sequence[Source]`):
            Donor first, then the others. Adapters without a config or tokenizer of their own are skipped.
        choice (`TokenChoice`, *optional*):
            Tokens and settings that the user chose: ids of different vocabularies are not compared.

    Returns:
        `list[str]`: One sentence for each difference; empty if all agree.
    """
    folders = [(source, open_folder(source.path)) for source in dict.fromkeys(sources)]
    try:
        in_configs = _differing_configs(folders, CONFIG_FILE, choice)
        first = choice.settings if choice is not None else sources[0]
        in_configs += _differing_configs(_led_by(first, folders), "generation_config.json", choice)
    except OSError as error:
        raise CheckpointError(f"Configs could not be compared: {error}.") from error
    return in_configs + find_tokenizer_disagreements([first, *sources], choice)


def find_tokenizer_disagreements(sources: Sequence[Source], choice: TokenChoice | None = None) -> list[str]:
    """Describe where vocabularies, special tokens and chat templates differ; those of the first model are taken."""
    folders = [(source, open_folder(source.path)) for source in dict.fromkeys(sources)]
    try:
        vocabularies = [] if choice is not None and choice.is_aligned else _differing_vocabularies(folders)
        return vocabularies + _differing_special_tokens(folders) + _differing_templates(folders)
    except OSError as error:
        raise CheckpointError(f"Tokenizers could not be compared: {error}.") from error


_Folders = list[tuple[Source, LocalFolder | RemoteFolder]]


def _led_by(first: Source, folders: _Folders) -> _Folders:
    return sorted(folders, key=lambda item: item[0] != first)


def _differing_configs(folders: _Folders, name: str, choice: TokenChoice | None = None) -> list[str]:
    configs = [(source, _flatten(read_json(folder, name, source.spec))) for source, folder in folders]
    if choice is not None and choice.is_aligned:  # other vocabularies have other ids and sizes
        configs = [
            (source, {key: flat[key] for key in flat if not _OF_TOKENS.search(key)}) for source, flat in configs
        ]
    configs = [(source, flat) for source, flat in configs if flat]
    sentences = []
    for key in sorted({key for _, flat in configs for key in flat}):
        important = any(part in key for part in _IMPORTANT_PARTS)
        values = [
            (source, json.dumps(flat[key]) if key in flat else _ABSENT)
            for source, flat in configs
            if key in flat or important
        ]
        if len({value for _, value in values}) > 1:
            sentences.append(f"{name}: {key} is {_by_value(values)}.")
    return sentences


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a config to dotted keys; rotary settings get the names of the newest transformers version."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in _IGNORED_KEYS:
            continue
        path = prefix + key
        if key == "rope_theta" and not prefix.endswith("rope_parameters."):
            path = f"{prefix}rope_parameters.rope_theta"
        elif key == "rope_scaling":
            path = f"{prefix}rope_parameters"
        if isinstance(value, dict):
            flat |= _flatten(value, path + ".")
        elif value is not None:
            flat[path] = value
    # `type` is the name `rope_type` had in old configs; absent means default.
    old_type = flat.pop(f"{prefix}rope_parameters.type", None)
    if old_type is not None:
        flat.setdefault(f"{prefix}rope_parameters.rope_type", old_type)
    if flat.get(f"{prefix}rope_parameters.rope_type") == "default":
        del flat[f"{prefix}rope_parameters.rope_type"]
    return flat


def _by_value(values: list[tuple[Source, str]]) -> str:
    """Group sources by value: `1 in 'a' and 'b' (taken), 2 in 'c'`."""
    holders: dict[str, list[str]] = {}
    for source, value in values:
        holders.setdefault(_short(value), []).append(repr(source.spec))
    parts = [f"{value} in {some(specs)}" for value, specs in holders.items()]
    parts[0] += " (taken)"
    return ", ".join(parts)


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _differing_vocabularies(folders: _Folders) -> list[str]:
    for name in VOCABULARIES:
        holders = [(source, folder) for source, folder in folders if folder.exists(name)]
        if len(holders) < 2:
            continue
        first, first_folder = holders[0]
        reference = read_file(first_folder, name, first.spec)
        different = []
        for source, folder in holders[1:]:
            content = read_file(folder, name, source.spec)
            if content != reference:
                difference = _vocabulary_difference(name, (first, reference), (source, content))
                different += [f"{source.spec!r} ({difference})"] if difference else []
        if different:
            return [f"{name}: the vocabulary of {first.spec!r} (taken) differs from that of {some(different)}."]
        return []
    return []


def _vocabulary_difference(name: str, reference: tuple[Source, bytes], other: tuple[Source, bytes]) -> str:
    """Describe how many tokens have another id; empty if only the settings around the vocabulary differ."""
    if name != "tokenizer.json":
        return "other bytes"
    first, second = parse_tokenizer(*reference), parse_tokenizer(*other)
    ours, theirs, moved = first.ids, second.ids, moved_tokens(first, second)
    if moved and reference[0].kind == other[0].kind == "full":
        raise CheckpointError(
            f"{len(moved)} tokens have other ids in {other[0].spec!r} than in {reference[0].spec!r} "
            f"({some(map(repr, moved))}): merged as they are stored, rows of different tokens would be mixed. Choose "
            "whose tokens the output gets, and rows are matched by token: --tokenizer-source base, union or an expert "
            "(tokenizer_source)."
        )
    count = sum(theirs.get(token) != index for token, index in ours.items()) + len(theirs.keys() - ours.keys())
    return f"{count} tokens differ; sizes {len(ours)} and {len(theirs)}" if count else ""


def _differing_special_tokens(folders: _Folders) -> list[str]:
    configs = [(source, read_json(folder, "tokenizer_config.json", source.spec)) for source, folder in folders]
    sentences = []
    for key in _SPECIAL_TOKENS:
        values = [(source, json.dumps(_text_of(config[key]))) for source, config in configs if config.get(key)]
        if len({value for _, value in values}) > 1:
            sentences.append(f"tokenizer_config.json: {key} is {_by_value(values)}.")
    return sentences


def _text_of(token: Any) -> Any:
    """Return the text of a token, which may be stored as an object with its settings."""
    return token.get("content") if isinstance(token, dict) else token


def _differing_templates(folders: _Folders) -> list[str]:
    templates = [(source, _chat_template(folder, source)) for source, folder in folders]
    with_tokenizer = [(source, text) for source, text in templates if text is not None]
    if len({text for _, text in with_tokenizer}) < 2:
        return []
    donor, taken = with_tokenizer[0]
    others = some(repr(source.spec) for source, text in with_tokenizer if text != taken)
    if not taken:
        return [f"{donor.spec!r} has no chat template, so neither has the output; there is one in {others}."]
    return [f"The chat template of {donor.spec!r} (taken) differs from that of {others}."]


def _chat_template(folder: LocalFolder | RemoteFolder, source: Source) -> str | None:
    """Return the text of the chat template, empty if the tokenizer has none, None if there is no tokenizer."""
    if folder.exists("chat_template.jinja"):
        return read_file(folder, "chat_template.jinja", source.spec).decode(errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder, name, source.spec).get("chat_template")
        if template:
            return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return "" if folder.exists("tokenizer_config.json") else None
