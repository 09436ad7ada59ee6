"""Files beside the weights: which are taken over from the donor, and where the experts disagree about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_frmerge.checkpoints.disk import make_folder, write_file
from hf_frmerge.checkpoints.files import LocalFolder, RemoteFolder, open_folder
from hf_frmerge.checkpoints.reader import read_json, some
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.errors import CheckpointError

CONFIG_FILE = "config.json"

_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".codes", ".py")
_TEMPLATES = "additional_chat_templates"
# Files that describe the donor's weights, its training or its evaluation, not the model's inputs.
_NOT_COPIED = {
    CONFIG_FILE,
    "config_sentence_transformers.json",
    "merge_manifest.json",
    "modules.json",
    "quantize_config.json",
    "requirements.txt",
    "sentence_bert_config.json",
    "trainer_state.json",
}
_NOT_COPIED_PARTS = ("adapter_", ".index.json", "_results", "eval_", "train_", "training_", "optimizer", "readme")
# Asked for by name where a server cannot list a folder.
_KNOWN = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

# Differences that say nothing about the function: names, versions, and dtypes (which alignment reports).
_IGNORED_KEYS = {"_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "use_cache"}
# Worth a word even where one config leaves them to the default of its transformers version.
_IMPORTANT_PARTS = (
    "rope",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)
_ABSENT = "not given"


def donor_files(source: Source) -> list[str]:
    """
    List what a merged model takes over from its donor besides weights and `config.json`.

    Args:
        source (`Source`):
            Base model, else first full expert.

    Returns:
        `list[str]`: Generation config, tokenizer, chat template, processor and remote-code files, sorted.

    Raises:
        CheckpointError: If the folder cannot be read.
    """
    folder = open_folder(source.path)
    try:
        names = _list(folder)
    except OSError as error:
        raise CheckpointError(f"{source.spec!r} cannot be listed: {error}.") from error
    return [name for name in names if name.startswith(f"{_TEMPLATES}/") or _is_copied(name)]


def copy_donor_files(source: Source, output_dir: str | Path) -> list[str]:
    """Copy the files of `donor_files` into `output_dir`, each whole or not at all; return their names."""
    folder = open_folder(source.path)
    names = donor_files(source)
    for name in names:
        target = Path(output_dir) / name
        make_folder(target.parent)
        write_file(target, _read(folder, name, source))
    return names


def write_config(source: Source, output_dir: str | Path, *, dtype: str | None = None) -> Path:
    """
    Write the donor's `config.json`, changed in its dtype only.

    Write it last: a folder without it is not a model to any loader.

    Args:
        source (`Source`):
            Base model, else first full expert.
        output_dir (`str` or `Path`):
            Folder to write into.
        dtype (`str`, *optional*):
            Name of the output dtype, such as `"bfloat16"`. None or `"auto"` keeps what the donor says.

    Returns:
        `Path`: The file.

    Raises:
        CheckpointError: If the donor has no `config.json`.
    """
    folder = open_folder(source.path)
    config = read_json(folder, CONFIG_FILE, source.spec)
    if not config:
        raise CheckpointError(f"{source.spec!r} has no {CONFIG_FILE}, so what is made from it could not be loaded.")
    content: bytes | str = _read(folder, CONFIG_FILE, source)
    if dtype not in (None, "auto") and _set_dtype(config, str(dtype)):
        content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    path = Path(output_dir) / CONFIG_FILE
    write_file(path, content)
    return path


def find_disagreements(sources: Sequence[Source]) -> list[str]:
    """
    Say where configs, tokenizers and chat templates differ, and which one the output takes.

    Args:
        sources (`Sequence[Source]`):
            Donor first, then the others. Adapters without a config or tokenizer of their own are passed over.

    Returns:
        `list[str]`: One sentence per difference; empty if all agree.
    """
    folders = [(source, open_folder(source.path)) for source in dict.fromkeys(sources)]
    try:
        found = _differing_configs(folders, CONFIG_FILE) + _differing_configs(folders, "generation_config.json")
        return found + _differing_vocabularies(folders) + _differing_templates(folders)
    except OSError as error:
        raise CheckpointError(f"Configs and tokenizers could not be compared: {error}.") from error


_Folders = list[tuple[Source, LocalFolder | RemoteFolder]]


def _list(folder: LocalFolder | RemoteFolder) -> list[str]:
    try:
        templates = [name for name in folder.names(_TEMPLATES) if name.endswith(".jinja")]
        return folder.names() + [f"{_TEMPLATES}/{name}" for name in templates]
    except (OSError, NotImplementedError):
        if isinstance(folder, LocalFolder):
            raise
        return [name for name in _KNOWN if folder.exists(name)]


def _is_copied(name: str) -> bool:
    lowered = name.lower()
    return (
        lowered.endswith(_SUFFIXES)
        and not name.startswith(".")
        and lowered not in _NOT_COPIED
        and not any(part in lowered for part in _NOT_COPIED_PARTS)
    )


def _read(folder: LocalFolder | RemoteFolder, name: str, source: Source) -> bytes:
    try:
        return folder.read(name)
    except OSError as error:
        raise CheckpointError(f"{source.spec!r}: {name} could not be read: {error}.") from error


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Set the dtype of a config and of the configs nested in it; whether anything changed."""
    changed = False
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    for key in keys:
        changed |= config[key] != dtype
        config[key] = dtype
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            changed |= _set_dtype(value, dtype)
    if not keys and "model_type" in config:
        config["dtype"] = dtype
        changed = True
    return changed


def _differing_configs(folders: _Folders, name: str) -> list[str]:
    configs = [(source, _flatten(read_json(folder, name, source.spec))) for source, folder in folders]
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
    """Dotted keys; rotary settings under one name, whichever transformers version wrote them."""
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
    """Put sources of one value together: `1 in 'a' and 'b' (taken), 2 in 'c'`."""
    holders: dict[str, list[str]] = {}
    for source, value in values:
        holders.setdefault(_short(value), []).append(repr(source.spec))
    parts = [f"{value} in {some(specs)}" for value, specs in holders.items()]
    parts[0] += " (taken)"
    return ", ".join(parts)


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _differing_vocabularies(folders: _Folders) -> list[str]:
    for name in _VOCABULARIES:
        holders = [(source, folder) for source, folder in folders if folder.exists(name)]
        if len(holders) < 2:
            continue
        first, first_folder = holders[0]
        reference = _read(first_folder, name, first)
        different = []
        for source, folder in holders[1:]:
            content = _read(folder, name, source)
            if content != reference:
                difference = _vocabulary_difference(name, (first, reference), (source, content))
                different += [f"{source.spec!r} ({difference})"] if difference else []
        if different:
            return [f"{name}: the vocabulary of {first.spec!r} (taken) differs from that of {some(different)}."]
        return []
    return []


def _vocabulary_difference(name: str, reference: tuple[Source, bytes], other: tuple[Source, bytes]) -> str:
    """Say how many tokens have another id; empty if only settings around the vocabulary differ."""
    if name != "tokenizer.json":
        return "other bytes"
    ours, theirs = _token_ids(*reference), _token_ids(*other)
    count = sum(theirs.get(token) != index for token, index in ours.items()) + len(theirs.keys() - ours.keys())
    return f"{count} tokens differ; sizes {len(ours)} and {len(theirs)}" if count else ""


def _token_ids(source: Source, content: bytes) -> dict[str, int]:
    try:
        tokenizer = json.loads(content)
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score], the id is the position
            vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{source.spec!r}: tokenizer.json makes no sense: {error!r}.") from error


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
    """Text of the chat template, empty if the tokenizer has none, None if there is no tokenizer."""
    if folder.exists("chat_template.jinja"):
        return _read(folder, "chat_template.jinja", source).decode(errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder, name, source.spec).get("chat_template")
        if template:
            return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return "" if folder.exists("tokenizer_config.json") else None
