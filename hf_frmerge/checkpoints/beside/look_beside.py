"""Decide which files beside the weights the output takes, from which model, and say which are left behind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_frmerge.checkpoints.beside.disagreements import (
    VOCABULARIES,
    find_disagreements,
    find_tokenizer_disagreements,
)
from hf_frmerge.checkpoints.beside.donor import CONFIG_FILE, donor_files, list_folder
from hf_frmerge.checkpoints.beside.sentence_transformers import (
    Pipeline,
    check_same_embeddings,
    read_pipeline,
    same_content,
)
from hf_frmerge.checkpoints.beside.settings import Settings, choose_settings
from hf_frmerge.checkpoints.disk import make_folder, write_file
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.source import Source
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.checkpoints.tensors.small_files import read_file, read_json
from hf_frmerge.checkpoints.vocabularies.choice import TokenChoice
from hf_frmerge.checkpoints.vocabularies.tokenizer_file import read_tokenizer
from hf_frmerge.errors import CheckpointError

# Files that turn text, images or sound into inputs of the model: tokenizers, chat templates, processors.
_INPUTS = re.compile(
    r"tokenizer.*|added_tokens\.json|special_tokens_map\.json|vocab\..+|merges\.txt|.+\.(model|tiktoken|spm|codes)"
    r"|chat_template\..+|additional_chat_templates/.+|(video_)?(pre)?processor_config\.json"
)
# Of these, the files that disagreements.py compares by meaning; they are not compared by bytes as well.
_COMPARED = re.compile(
    r"tokenizer(_config)?\.json|tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model|vocab\..+|merges\.txt"
    r"|added_tokens\.json|special_tokens_map\.json|chat_template\..+"
)
# Files that no loader of the merged model reads: weights in other formats, traces of the training, documents.
_IRRELEVANT = re.compile(
    r"config\.json|model(-\d+-of-\d+)?\.safetensors|adapter_(config\.json|model\..+)|consolidated.*|.+\.index\.json"
    r"|(pytorch|tf|flax|rust)_model.*|.+\.(gguf|onnx|onnx_data|h5|msgpack|ot|mlmodel|tflite)"
    r"|trainer_.+|training_.+|train_.+|eval_.+|.+_results\.json|events\..+|.+\.log|latest|zero_to_fp32\.py"
    r"|(optimizer|scheduler|scaler|rng_state|random_states).*"
    r"|\..+|readme.*|licen[cs]e.*|notice.*|use_policy.*|requirements\.txt|.+\.(md|png|jpe?g|gif|svg|webp|pdf|html|ya?ml)"
    r"|merge_(manifest\.json|coefficients\.safetensors|evaluation\.json)"
)
_IRRELEVANT_FOLDERS = re.compile(
    r"\..+|runs|logs|wandb|checkpoint-\d+|global_step\d+|original|onnx|openvino|coreml|gguf|eval.*|assets|images"
    r"|__pycache__"
)


@dataclass(frozen=True, slots=True)
class CarriedFile:
    """File that the output takes from one of the models, under the same name."""

    source: Source
    name: str


@dataclass(frozen=True, slots=True)
class Beside:
    """
    Files the output takes besides weights and config, and notes about these and about files left behind.

    If the user chose its tokens or settings, also the files that were made for it, by name; the entries of its config
    that follow; and what was read to make these.
    """

    files: tuple[CarriedFile, ...]
    notes: tuple[str, ...]
    generated: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    read: tuple[CarriedFile, ...] = ()


def look_beside(
    experts: Sequence[Source],
    base: Source | None,
    *,
    makes_adapter: bool,
    choice: TokenChoice | None = None,
    n_rows: int | None = None,
) -> Beside:
    """
    Decide which files lie beside the merged weights. Reads small files only.

    A full model gets the files of its donor (base, else first full expert). If the donor has no tokenizer, it gets
    the inputs (tokenizer, chat template, processor) of the first model that has one. A merged adapter gets the inputs
    of its adapters if they agree. Both get the sentence-transformers modules of the experts, which must agree, else
    those of the base.

    Args:
        experts (`Sequence[Source]`):
            Models that are merged.
        base (`Source`, *optional*):
            Base model.
        makes_adapter (`bool`):
            Whether the output is an adapter.
        choice (`TokenChoice`, *optional*):
            Tokens and settings that the user chose for it.
        n_rows (`int`, *optional*):
            Rows of its embeddings, if they were matched by token.

    Returns:
        `Beside`: The files, and notes on files that come from another model, that differ, or that are left behind.

    Raises:
        CheckpointError: If a file cannot be read or parsed, or experts pool their outputs differently.
    """
    experts = list(dict.fromkeys(experts))
    models = list(dict.fromkeys([*([base] if base and not makes_adapter else []), *experts]))
    try:
        model_folders = [_ModelFolder.of(model) for model in models]
        carried: dict[str, Source] = {}
        donor = base or next((expert for expert in experts if expert.kind == "full"), None)
        settings: Settings | None = None
        if makes_adapter or donor is None:
            notes = _inputs_of_adapters(model_folders, carried, choice)
        elif choice is not None:
            settings = choose_settings(donor, choice, n_rows)
            carried.update(settings.files | dict.fromkeys(settings.generated, choice.settings))
            notes = find_disagreements([donor, *models], choice)
        else:
            carried.update(dict.fromkeys(donor_files(donor), donor))
            notes = _inputs_without_donor(model_folders, carried) + find_disagreements([donor, *models])
        notes += _embeddings_too_few(carried, donor)
        notes += _carry_pipeline(model_folders, base, carried)
        notes += _differing(model_folders, carried) + _left(model_folders, carried)
    except OSError as error:
        raise CheckpointError(f"The files beside the weights could not be compared: {error}.") from error
    generated = settings.generated if settings is not None else {}
    files = tuple(CarriedFile(source, name) for name, source in carried.items() if name not in generated)
    if settings is None:
        return Beside(files, tuple(notes))
    read = tuple(CarriedFile(source, name) for source, name in settings.read)
    return Beside(files, tuple(notes), generated, settings.config, read)


def copy_files(files: Iterable[CarriedFile], output_dir: str | Path) -> list[str]:
    """Copy the files `look_beside` chose into `output_dir`, each one atomically; return their names."""
    names = []
    for file in files:
        target = Path(output_dir) / file.name
        make_folder(target.parent)
        write_file(target, read_file(open_folder(file.source.path), file.name, file.source.spec))
        names.append(file.name)
    return names


def write_files(files: Mapping[str, str], output_dir: str | Path) -> list[str]:
    """Write the files that `look_beside` made into `output_dir`, each one atomically; return their names."""
    for name, text in files.items():
        write_file(Path(output_dir) / name, text)
    return list(files)


@dataclass(frozen=True)
class _ModelFolder:
    """Contents of a model's folder: names of files and of further folders, and its sentence-transformers modules."""

    model: Source
    names: list[str]
    folders: list[str]
    pipeline: Pipeline | None

    @classmethod
    def of(cls, model: Source) -> _ModelFolder:
        folder = open_folder(model.path)
        names, pipeline = list_folder(folder), read_pipeline(model)
        known = {name.partition("/")[0] for name in names if "/" in name}
        if pipeline is not None:
            names = list(dict.fromkeys([*names, *pipeline.files]))
            known |= {module.path.partition("/")[0] for module in pipeline.modules}
        try:
            folders = [name for name in folder.subfolders() if name not in known]
        except (OSError, NotImplementedError):  # a web server that cannot list folders
            folders = []
        return cls(model, names, folders, pipeline)

    @property
    def inputs(self) -> list[str]:
        return [name for name in self.names if _INPUTS.fullmatch(name)]

    def read(self, name: str) -> bytes:
        return read_file(open_folder(self.model.path), name, self.model.spec)


def _has_tokenizer(names: Iterable[str]) -> bool:
    return any(name in VOCABULARIES or name == "tokenizer_config.json" for name in names)


def _inputs_without_donor(model_folders: Sequence[_ModelFolder], carried: dict[str, Source]) -> list[str]:
    """If the donor has no tokenizer, take that of the first model that has one."""
    holder = next((each for each in model_folders if _has_tokenizer(each.names)), None)
    if holder is None or _has_tokenizer(carried):
        return []
    names = [name for name in holder.inputs if name not in carried]
    carried.update(dict.fromkeys(names, holder.model))
    return [
        f"{model_folders[0].model.spec!r} has no tokenizer; that of {holder.model.spec!r} is taken ({some(names)})."
    ]


def _inputs_of_adapters(
    adapters: Sequence[_ModelFolder], carried: dict[str, Source], choice: TokenChoice | None
) -> list[str]:
    """Take the tokenizer and chat template of the model that was chosen, or of the adapters if all with one agree."""
    if choice is not None:
        chosen = _ModelFolder.of(choice.settings)
        carried.update(dict.fromkeys(chosen.inputs, choice.settings))
        return []
    holders = [adapter for adapter in adapters if adapter.inputs]
    if not holders:
        return []
    if find_tokenizer_disagreements([holder.model for holder in holders]):
        return [
            f"The tokenizers or chat templates beside {some(repr(holder.model.spec) for holder in holders)} differ: "
            "the merged adapter gets none, and works with those of its base. Copy the ones you want into its folder."
        ]
    holder = next((each for each in holders if _has_tokenizer(each.names)), holders[0])
    carried.update(dict.fromkeys(holder.inputs, holder.model))
    return []


def _embeddings_too_few(carried: Mapping[str, Source], model: Source | None) -> list[str]:
    """Note it if a tokenizer taken from another model has ids that the model has no embeddings for."""
    source = carried.get("tokenizer.json")
    if source is None or model is None or source == model:
        return []
    config = read_json(open_folder(model.path), CONFIG_FILE, model.spec)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    size = max((part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)), default=None)
    tokenizer = read_tokenizer(source)
    last = max(tokenizer.ids.values(), default=-1) if tokenizer is not None else -1
    if size is None or last < size:
        return []
    return [
        f"The tokenizer of {source.spec!r} has ids up to {last}, but {model.spec!r} has embeddings for {size} only: "
        "tokens were added to it, and the output has no weights for them. Resize the embeddings before you use them."
    ]


def _carry_pipeline(
    model_folders: Sequence[_ModelFolder], base: Source | None, carried: dict[str, Source]
) -> list[str]:
    """Take the sentence-transformers modules of the experts, which were trained with them, else those of the base."""
    experts = [each for each in model_folders if each.model != base]
    pipelines = [each.pipeline for each in experts if each.pipeline]
    pipelines = pipelines or [each.pipeline for each in model_folders if each.pipeline]
    if not pipelines:
        return []
    check_same_embeddings(pipelines)
    first = pipelines[0]
    carried.update(dict.fromkeys(first.files, first.source))
    lacking = [repr(each.model.spec) for each in model_folders if each.pipeline is None]
    if not lacking:
        return []
    return [f"{some(first.files)} are those of {first.source.spec!r}; there are none in {some(lacking)}."]


def _differing(model_folders: Sequence[_ModelFolder], carried: Mapping[str, Source]) -> list[str]:
    """Note the files that are taken from one model and differ in another."""
    notes = []
    for name, holder in carried.items():
        if _COMPARED.fullmatch(name) or name == "generation_config.json":
            continue
        others = [each for each in model_folders if each.model != holder and name in each.names]
        taken = next(each for each in model_folders if each.model == holder).read(name) if others else b""
        different = [repr(each.model.spec) for each in others if not same_content(name, taken, each.read(name))]
        if different:
            notes.append(f"{name} differs in {some(different)}; that of {holder.spec!r} is taken.")
    return notes


def _left(model_folders: Sequence[_ModelFolder], carried: Mapping[str, Source]) -> list[str]:
    """Note the files that are not taken, unless no loader needs them or another note is about them."""
    holders: dict[str, list[str]] = {}
    for each in model_folders:
        vocabularies, taken = set(VOCABULARIES) & set(each.names), set(VOCABULARIES) & set(carried)
        # A vocabulary in another format than the one taken was compared with nothing, so it must be named here.
        is_compared = _has_tokenizer(carried) and (not vocabularies or bool(vocabularies & taken))
        for name in each.names:
            is_module = each.pipeline is not None and "/" in name and name in each.pipeline.files
            is_noted = is_module or (is_compared and _COMPARED.fullmatch(name))
            if name not in carried and not is_noted and not _IRRELEVANT.fullmatch(name.lower()):
                holders.setdefault(name, []).append(repr(each.model.spec))
        for folder in each.folders:
            if not _IRRELEVANT_FOLDERS.fullmatch(folder.lower()):
                holders.setdefault(f"{folder}/", []).append(repr(each.model.spec))
    if not holders:
        return []
    listed = "; ".join(f"{name} of {some(specs)}" for name, specs in sorted(holders.items()))
    return [f"Beside the weights these were left behind: {listed}."]
