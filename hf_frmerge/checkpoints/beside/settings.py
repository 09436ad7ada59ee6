"""Settings of the output where the user chose its tokens, or the model that it behaves like: files and ids agree."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_frmerge.checkpoints.beside.donor import CONFIG_FILE, donor_files, list_folder
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.names.tokens import with_n_tokens
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.small_files import read_json
from hf_frmerge.checkpoints.vocabularies.choice import TokenChoice
from hf_frmerge.checkpoints.vocabularies.tokenizer_file import TOKENIZER_FILE
from hf_frmerge.errors import CheckpointError

GENERATION_FILE = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_TOKENIZER = re.compile(
    r"tokenizer.*|added_tokens\.json|special_tokens_map\.json|vocab\..+|merges\.txt|.+\.(model|tiktoken|spm|codes)"
)
_TEMPLATE = re.compile(r"chat_template\..+|additional_chat_templates/.+")
# Special tokens that say where a text begins and ends; the others belong to the model.
_ENDS = ("bos_token", "eos_token", "pad_token")
_ID_KEYS = re.compile(r".+_token_ids?|.+_token_index|(begin_)?suppress_tokens|bad_words_ids")


@dataclass(frozen=True)
class Settings:
    """
    Files and entries of the config that follow from a choice of tokens and settings.

    Attributes:
        files: name -> the model it is taken from.
        generated: name -> text of a file that no model has.
        config: entries of `config.json` that differ from the donor's.
        read: files that were read to make these, by model.
    """

    files: dict[str, Source]
    generated: dict[str, str]
    config: dict[str, Any]
    read: tuple[tuple[Source, str], ...]


def choose_settings(donor: Source, choice: TokenChoice, n_rows: int | None) -> Settings:
    """
    Choose tokenizer, chat template, generation settings and special ids of a full model, so that they agree.

    Args:
        donor (`Source`):
            Model whose config and other files the output gets.
        choice (`TokenChoice`):
            Tokens and settings of the output.
        n_rows (`int`, *optional*):
            Rows of its embeddings, if that is another number than the donor's.

    Raises:
        CheckpointError: If the output lacks a token that the settings need, or a file cannot be read.
    """
    holder, settings = choice.holder, choice.settings
    own = {model: list_folder(open_folder(model.path)) for model in dict.fromkeys((donor, holder, settings))}
    files = {name: donor for name in donor_files(donor) if not _TOKENIZER.fullmatch(name)}
    files = {name: model for name, model in files.items() if not _TEMPLATE.fullmatch(name)}
    files |= {name: holder for name in own[holder] if _TOKENIZER.fullmatch(name)}
    files |= {name: settings for name in own[settings] if _TEMPLATE.fullmatch(name)}
    files |= {GENERATION_FILE: settings} if GENERATION_FILE in own[settings] else {}
    generated: dict[str, str] = {}
    if choice.tokenizer_json is not None:
        # Files in other formats know only the tokens of their own model.
        kept = (_TOKENIZER_CONFIG, _SPECIAL_TOKENS_FILE)
        files = {name: model for name, model in files.items() if not _TOKENIZER.fullmatch(name) or name in kept}
        generated[TOKENIZER_FILE] = choice.tokenizer_json
    for name in (_TOKENIZER_CONFIG, _SPECIAL_TOKENS_FILE):
        if name in files:
            before = _json(holder, name)
            after = _tokenizer_settings(before, name, choice)
            generated |= _as_text(name, after) if after != before else {}
    if GENERATION_FILE in files:
        before = _json(files[GENERATION_FILE], GENERATION_FILE)
        after = _with_ids(before, _translation(files[GENERATION_FILE], choice, GENERATION_FILE))
        generated |= _as_text(GENERATION_FILE, after) if after != before else {}
    names = (_TOKENIZER_CONFIG, _SPECIAL_TOKENS_FILE, GENERATION_FILE, CONFIG_FILE)
    read = [(model, name) for model in own for name in names if name in own[model]]
    read += [(model, TOKENIZER_FILE) for model in choice.tokenizers]
    files = {name: model for name, model in files.items() if name not in generated}
    return Settings(files, generated, _config(donor, choice, n_rows), tuple(read))


def _tokenizer_settings(config: dict[str, Any], name: str, choice: TokenChoice) -> dict[str, Any]:
    """Return a tokenizer's settings with the chat template and the special tokens of another model."""
    changed = copy.deepcopy(config)
    if choice.tokenizer_json is not None:
        changed.pop("added_tokens_decoder", None)  # they are in tokenizer.json, which has more of them
    if choice.settings == choice.holder:
        return changed
    theirs = _json(choice.settings, _TOKENIZER_CONFIG)
    named = {**_json(choice.settings, _SPECIAL_TOKENS_FILE), **theirs}
    for key in _ENDS:
        if named.get(key):
            _require(_text(named[key]), choice, f"{key} of {choice.settings.spec!r}")
            changed[key] = named[key]
    if name == _TOKENIZER_CONFIG:
        changed.pop("chat_template", None)
        changed |= {"chat_template": theirs["chat_template"]} if theirs.get("chat_template") else {}
    return changed


def _config(donor: Source, choice: TokenChoice, n_rows: int | None) -> dict[str, Any]:
    """Return the entries of the donor's `config.json` that change: the number of tokens, and ids."""
    config = _json(donor, CONFIG_FILE)
    changed = copy.deepcopy(config)
    if n_rows is not None:
        before = next((level["vocab_size"] for level in _language(config) if "vocab_size" in level), n_rows)
        changed |= with_n_tokens(config, before, n_rows)
    changed = _with_ids(changed, _translation(donor, choice, CONFIG_FILE))
    if choice.settings != donor:
        theirs = _with_ids(_json(choice.settings, CONFIG_FILE), _translation(choice.settings, choice, CONFIG_FILE))
        for level in _language(changed):
            for key in (f"{name}_id" for name in _ENDS):
                values = [each[key] for each in _language(theirs) if each.get(key) is not None]
                if values and key in level:
                    level[key] = values[0]
    return {key: value for key, value in changed.items() if value != config.get(key)}


def _language(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the levels of a config that describe the language model."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def _translation(model: Source, choice: TokenChoice, file: str) -> Callable[[str, int], int]:
    """Return a function that gives the id in the output of the token that an id stands for in a model."""
    tokenizer = choice.tokenizers.get(model)
    tokens = {place: token for token, place in tokenizer.ids.items()} if tokenizer is not None else {}

    def translate(key: str, place: int) -> int:
        token = tokens.get(place)
        if token is None:  # -1, or a row without a token
            return place
        return _require(token, choice, f"{key} in the {file} of {model.spec!r}")

    return translate


def _with_ids(config: dict[str, Any], translate: Callable[[str, int], int]) -> dict[str, Any]:
    """Return a config with the ids of tokens in it translated."""

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: changed(inner, part) for inner, part in value.items()}
        if not _ID_KEYS.fullmatch(key):
            return value
        if isinstance(value, list):
            return [changed(key, part) for part in value]
        return translate(key, value) if isinstance(value, int) and not isinstance(value, bool) else value

    return {key: changed(key, value) for key, value in config.items()}


def _require(token: str, choice: TokenChoice, what: str) -> int:
    if token not in choice.output:
        raise CheckpointError(
            f"The output does not have the token {token!r}, which is the {what}. Keep the tokens of all models, with "
            "--tokenizer-source union (tokenizer_source), or take the settings of another model (--settings-from)."
        )
    return choice.output[token]


def _text(token: Any) -> str:
    """Return the text of a token, which may be stored as an object with its settings."""
    return str(token.get("content")) if isinstance(token, Mapping) else str(token)


def _json(model: Source, name: str) -> dict[str, Any]:
    return read_json(open_folder(model.path), name, model.spec)


def _as_text(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n"}
