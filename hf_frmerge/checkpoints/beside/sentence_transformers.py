"""Pooling, normalisation and prompts of sentence-transformers models, stored in folders beside the weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.modules_file import MODULES_FILE, Module, parse_modules
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.checkpoints.source import Source
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.checkpoints.tensors.small_files import read_file
from hf_frmerge.errors import CheckpointError

# Files for prompts and similarity, and for the longest input and lower-casing.
_SETTINGS = re.compile(r"config_sentence_transformers\.json|sentence_[\w-]+_config\.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Defaults that some versions of sentence-transformers write into the configs of modules and others leave out.
_DEFAULTS: dict[str, Any] = {
    "include_prompt": True,
    "module_input_name": "sentence_embedding",
    "module_output_name": "sentence_embedding",
}
# Pooling modes as older versions wrote them: one flag each.
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_VERSIONS = ("__version__", "_name_or_path", "transformers_version")
_ENCODERS_ALONE = f"To merge the encoders alone, pass copies of the folders without {MODULES_FILE}."


@dataclass(frozen=True)
class Pipeline:
    """
    Modules that make embeddings from one model's outputs.

    Attributes:
        source: the model.
        modules: its modules, in order.
        files: names of `modules.json`, of the settings, and of all files in the folders of the modules.
        folder: where the files are read from.
    """

    source: Source
    modules: list[Module]
    files: list[str]
    folder: LocalFolder | RemoteFolder = field(compare=False)

    def read(self, name: str) -> bytes:
        """Read one of its files; a file it does not have counts as a config with nothing but defaults."""
        return read_file(self.folder, name, self.source.spec) if name in self.files else b"{}"

    def settings(self, name: str) -> dict[str, Any]:
        """Return what one of its JSON files says, without versions and defaults, under the newest names."""
        settings = _settings(self.read(name))
        return settings if isinstance(settings, dict) else {}


def read_pipeline(source: Source) -> Pipeline | None:
    """
    Return the pipeline of a model; `None` if it has no `modules.json`.

    Raises:
        CheckpointError: If `modules.json` cannot be parsed, or a module holds a model of its own.
    """
    folder = open_folder(source.path)
    if not folder.exists(MODULES_FILE):
        return None
    modules = parse_modules(read_file(folder, MODULES_FILE, source.spec), source.spec)
    files = [MODULES_FILE, *(name for name in names_in(folder) if _SETTINGS.fullmatch(name))]
    for path in dict.fromkeys(module.path for module in modules if module.path):
        inside = [name for name in names_in(folder, path) if not name.startswith(".") and not name.endswith(".md")]
        nested = [name for name in inside if name in (MODULES_FILE, "router_config.json")]
        if nested or any(module.kind == "Transformer" for module in modules if module.path == path):
            raise CheckpointError(
                f"{source.spec!r}: the module {path!r} of {MODULES_FILE} holds a model of its own, which is not "
                "merged with the one beside it. Merge the folders that hold a model one by one."
            )
        files += [f"{path}/{name}" for name in inside]
    return Pipeline(source, modules, files, folder)


def check_same_embeddings(pipelines: Sequence[Pipeline]) -> None:
    """
    Check that models make their embeddings in one way; prompts and the longest input may differ.

    Raises:
        CheckpointError: If they pool, project or normalise differently: no mean of encoders fits two poolings.
    """
    first = pipelines[0]
    for other in pipelines[1:]:
        pair = f"{first.source.spec!r} and {other.source.spec!r}"
        if first.modules != other.modules:
            steps = " and ".join(", ".join(module.kind for module in each.modules) for each in (first, other))
            raise CheckpointError(f"{pair} make embeddings in different steps ({steps}). {_ENCODERS_ALONE}")
        for name in dict.fromkeys(name for name in (*first.files, *other.files) if "/" in name):
            mine, theirs = first.read(name), other.read(name)
            if same_content(name, mine, theirs):
                continue
            if name.endswith(_WEIGHTS):
                raise CheckpointError(_weights_differ(name, pair))
            raise CheckpointError(
                f"{pair} make embeddings of their outputs differently: {name} differs in "
                f"{_differing_keys(mine, theirs)}. No mean of the two encoders fits both. {_ENCODERS_ALONE}"
            )


def same_content(name: str, one: bytes, other: bytes) -> bool:
    """Whether two files are equal: byte for byte or, if they are JSON, in everything but versions and defaults."""
    return one == other or (name.endswith(".json") and _settings(one) == _settings(other))


def names_in(folder: LocalFolder | RemoteFolder, subfolder: str = "") -> list[str]:
    """List the files in a folder; if a server cannot list, the files of sentence-transformers that it has."""
    try:
        return folder.names(subfolder)
    except (OSError, NotImplementedError):
        if isinstance(folder, LocalFolder):
            raise
    prefix = f"{subfolder}/" if subfolder else ""
    known = ("config.json", "model.safetensors", "pytorch_model.bin")
    settings = ("config_sentence_transformers.json", "sentence_bert_config.json")
    return [name for name in (known if subfolder else settings) if folder.exists(prefix + name)]


def _settings(content: bytes) -> Any:
    """Return the contents of a JSON file without versions and defaults, under the newest names."""
    try:
        parsed = parse_json(content)
    except ValueError:
        return content
    if not isinstance(parsed, dict):
        return parsed
    # Old and new versions of sentence-transformers write the same settings under different names.
    poolings = [name for key, name in _POOLINGS.items() if parsed.pop(key, False)]
    if poolings:
        parsed["pooling_mode"] = poolings[0] if len(poolings) == 1 else poolings
    if "word_embedding_dimension" in parsed:
        parsed["embedding_dimension"] = parsed.pop("word_embedding_dimension")
    # A setting that is False, null or empty counts as missing, too, unless it is True where it is missing.
    return {
        key: value
        for key, value in parsed.items()
        if key not in _VERSIONS
        and (value is not False or _DEFAULTS.get(key) is True)
        and value not in (None, {}, _DEFAULTS.get(key))
    }


def _differing_keys(one: bytes, other: bytes) -> str:
    mine, theirs = _settings(one), _settings(other)
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return "its contents"
    return some(key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key))


def _weights_differ(name: str, pair: str) -> str:
    path = name.rpartition("/")[0]
    return (
        f"{name} differs in {pair}: these weights lie outside of the model, and are not merged with it. Merge the "
        f"folders {path} on their own (`frmerge merge A/{path} B/{path}`; weights in a .bin file have to be saved as "
        f"model.safetensors first), and the encoders from copies of the folders without {MODULES_FILE}; then put "
        f"{MODULES_FILE} and the folders of its modules beside the merged encoder."
    )
