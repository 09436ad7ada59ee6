"""Location and kind (full model or adapter) of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.visible import without_secrets

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.local_folder import LocalFolder
    from hf_frmerge.checkpoints.remote_folder import RemoteFolder


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Names of the files that hold weights in one format: of a model in one file, of the index of several, adapter."""

    single: str
    index: str
    adapter: str


SAFETENSORS = WeightFiles("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
PICKLES = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
WEIGHTS = (SAFETENSORS.single, SAFETENSORS.index)
GGUF_SUFFIX = ".gguf"

HUB_SCHEME = "hub://"

_ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_CACHED = re.compile(r"(?:.*[/\\])?models--(?P<repo>[\w.-]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})[/\\]*")
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_CONVERT_GGUF = (
    "Let transformers dequantise it once (with the gguf package):\n"
    "    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig\n"
    '    folder, name = "ITS FOLDER", "{name}"\n'
    "    config = GgufConfig(dequantize=True)\n"
    "    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, quantization_config=config)\n"
    '    model.save_pretrained("converted")\n'
    '    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained("converted")'
)
_GGUF_ELSEWHERE = (
    "{spec!r} has GGUF weights only, which are read from files on this machine. Fetch the one you want (from the Hub "
    "with `hf download {repo} {name} --local-dir FOLDER`), and pass it: FOLDER/{name}."
)
_ALLOW_PICKLE = (
    "A pickle can run code when it is opened, so it is left alone unless you ask: with --allow-pickle (allow_pickle) "
    "its tensors are read as `torch.load(weights_only=True)` finds them, which runs none of the code it may name."
)


@dataclass(frozen=True, slots=True)
class Source:
    """
    Location of one checkpoint.

    `spec` is what the user wrote, without the password of a URL. `path` is a local folder, a URL,
    `hub://org/name@commit` for a Hub checkpoint that is not on this machine, or a GGUF file (the first one, of a model
    that is split), which then `is_gguf`. For a Hub checkpoint `repo_id`, the requested `revision` (None: the default
    branch) and the `commit` it resolved to are set. `is_pickled` says that its weights are pickles, which the user has
    allowed. A full model that is to be read with an adapter on it (`base+adapter`) has the `adapter`; all else is
    about the model.
    """

    spec: str
    kind: Literal["full", "adapter"]
    path: str
    repo_id: str | None = None
    revision: str | None = None
    commit: str | None = None
    is_pickled: bool = False
    adapter: Source | None = None
    is_gguf: bool = False

    @property
    def parts(self) -> tuple[Source, ...]:
        """The model and the adapter on it, each by itself."""
        return (self,) if self.adapter is None else (replace(self, adapter=None), self.adapter)

    @property
    def weight_files(self) -> WeightFiles:
        """Names that the files of its weights may have."""
        if self.is_gguf:
            return replace(SAFETENSORS, single=Path(self.path).name)
        return PICKLES if self.is_pickled else SAFETENSORS


def is_on_hub(source: Source) -> bool:
    """Whether a source is on the Hub and not on this machine."""
    return source.path.startswith(HUB_SCHEME)


def check_name(path: str) -> None:
    """
    Check that the name of a folder is text: names of other bytes cannot be written into a record, or on a card.

    Raises:
        ArgumentError: If it is not.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"The name of {path!r} is not UTF-8. Rename the folder.") from None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id (`org/name` or `name`), which short relative paths have, too."""
    return _HUB_ID.fullmatch(name) is not None and not set(name.split("/")) & {".", ".."}


def cached_hub_id(path: str) -> tuple[str, str] | None:
    """Return Hub id and commit of a path in a Hub cache, also in that of another machine; None for other paths."""
    match = _CACHED.fullmatch(path)
    return (match["repo"].replace("--", "/"), match["commit"]) if match else None


def name_of(source: Source) -> tuple[str, str | None]:
    """Return the name and revision others can find a model by: Hub id and commit, else URL or absolute path."""
    if source.repo_id is not None:
        return source.repo_id, source.commit
    if "://" in source.path:
        return without_secrets(source.path), None
    # A path into a Hub cache is only valid on this machine; id and commit are valid everywhere.
    path = str(Path(source.path).absolute())
    return cached_hub_id(path) or (path, None)


def gguf_source(path: Path, spec: str) -> Source:
    """Return the source of a model in a local GGUF file; of a model that is split, any of its files stands for all."""
    return Source(spec, "full", str(path.with_name(gguf_parts(path.name)[0])), is_gguf=True)


def gguf_parts(name: str) -> list[str]:
    """Return the names of all files of the model that a GGUF file belongs to, in order."""
    split = _SPLIT.fullmatch(name)
    if split is None:
        return [name]
    stem, _, count = split.groups()
    return [f"{stem}-{number:05d}-of-{count}.gguf" for number in range(1, max(1, int(count)) + 1)]


def refuse_gguf(sources: Iterable[Source], purpose: str = "An evaluation runs its models") -> None:
    """
    Raise if a model is a GGUF file, which can be merged, but not run.

    Args:
        sources: The models.
        purpose: What they would be run for, as the beginning of a sentence.

    Raises:
        CheckpointError: With code that makes a model of the file.
    """
    for source in sources:
        if source.is_gguf:
            name = Path(source.path).name
            raise CheckpointError(f"{purpose}, and {source.spec!r} is a GGUF file. {_CONVERT_GGUF.format(name=name)}")


def source_of(
    folder: LocalFolder | RemoteFolder,
    spec: str,
    path: str,
    repo_id: str | None = None,
    revision: str | None = None,
    commit: str | None = None,
    *,
    allow_pickle: bool = False,
) -> Source:
    """
    Return the source in a folder, a full checkpoint or an adapter. Pickles are taken where there is nothing else.

    Args:
        folder: The folder.
        spec, path, repo_id, revision, commit: As the source will have them.
        allow_pickle: Whether its weights may be pickles.

    Raises:
        CheckpointError: If it holds neither or both; the message says what it holds.
    """
    try:
        for files in (SAFETENSORS, PICKLES) if allow_pickle else (SAFETENSORS,):
            kind = _kind_of(folder, spec, files)
            if kind is not None:
                return Source(spec, kind, path, repo_id, revision, commit, files is PICKLES)
        if folder.exists(_ADAPTER_CONFIG):
            raise _no_adapter(spec, folder.exists(PICKLES.adapter))
        names, below = list(_names(folder)), _models_below(folder)
    except OSError as error:
        raise CheckpointError(f"{spec!r} could not be opened: {error}.") from error
    ggufs = [name for name in names if name.endswith(GGUF_SUFFIX)]
    if not ggufs or any(name.endswith((".safetensors", *_PICKLE_SUFFIXES)) for name in names):
        raise _no_weights(spec, names, below)
    if "://" in folder.path or repo_id is not None:
        raise CheckpointError(_GGUF_ELSEWHERE.format(spec=spec, repo=repo_id or "ORG/NAME", name=ggufs[0]))
    return gguf_source(Path(path, _only_model(ggufs, spec, path)), spec)


def _only_model(ggufs: Iterable[str], spec: str, path: str) -> str:
    """Return the file of the one model in a folder of GGUF files."""
    models = list(dict.fromkeys(gguf_parts(name)[0] for name in sorted(ggufs)))
    if len(models) > 1:
        raise CheckpointError(
            f"{spec!r} holds {len(models)} GGUF files that may each be a model. Pass the one you mean: "
            f"{_either(str(Path(path, name)) for name in models)}."
        )
    return models[0]


def _kind_of(folder: LocalFolder | RemoteFolder, spec: str, files: WeightFiles) -> Literal["full", "adapter"] | None:
    """Return whether a folder holds a full checkpoint or an adapter with weights of these names; None for neither."""
    weights = next((name for name in (files.single, files.index) if folder.exists(name)), None)
    is_adapter = folder.exists(_ADAPTER_CONFIG)
    if weights and is_adapter:
        raise _two_models(spec, weights)
    if weights and not folder.exists("config.json"):
        raise CheckpointError(f"{spec!r} has weights but no config.json. Add the one of its model class.")
    return "full" if weights else "adapter" if is_adapter and folder.exists(files.adapter) else None


def _no_adapter(spec: str, has_pickle: bool) -> CheckpointError:
    if has_pickle:
        return CheckpointError(f"{spec!r} has pickle weights only ({PICKLES.adapter}). {_ALLOW_PICKLE}")
    return CheckpointError(
        f"{spec!r} is an adapter without {SAFETENSORS.adapter}. Copy or download it again, or save it anew with "
        "PEFT's `save_pretrained`."
    )


def _models_below(folder: LocalFolder | RemoteFolder) -> list[str]:
    """
    Return the folders that hold a model, up to two levels below a local one.

    These are the snapshots of a Hub cache, checkpoints of a run, and named adapters. The snapshot that a cache names
    `main`, and the last checkpoint, come first.
    """
    if "://" in folder.path:
        return []
    root = Path(folder.path)
    marks = (*WEIGHTS, PICKLES.single, PICKLES.index, _ADAPTER_CONFIG)
    folders = {Path(mark).parent for name in marks for mark in (*root.glob(f"*/{name}"), *root.glob(f"*/*/{name}"))}
    main = root / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else ""

    def last_first(path: Path) -> tuple[bool, list[int], str]:
        return path.name != commit, [-int(number) for number in re.findall(r"\d+", path.name)[-1:]], path.name

    return [path.relative_to(root).as_posix() for path in sorted(folders, key=last_first)]


def _either(names: Iterable[str], limit: int = 3) -> str:
    """Return a choice of names as text: `'a', 'b' or 'c' (and 2 more)`."""
    shown = [repr(name) for name in names]
    rest = len(shown) - limit
    *first, last = shown[:limit]
    return (f"{', '.join(first)} or {last}" if first else last) + (f" (and {rest} more)" if rest > 0 else "")


def _two_models(spec: str, weights: str) -> CheckpointError:
    return CheckpointError(
        f"{spec!r} holds a full model ({weights}) and an adapter ({_ADAPTER_CONFIG}), and transformers would load the "
        f"model with the adapter on it. Move {_ADAPTER_CONFIG} and {SAFETENSORS.adapter} to a folder of their own (of "
        "a Hub repository, download one without the other: `hf download ORG/NAME --exclude 'adapter_*' --local-dir "
        "FOLDER`) and pass the folder you mean. To merge both as one model, fold the adapter in with PEFT's "
        "`merge_and_unload`, and pass what you save then."
    )


def _names(folder: LocalFolder | RemoteFolder) -> Iterable[str]:
    try:
        return folder.names()
    except (OSError, NotImplementedError):
        # Web servers often do not list folders. Without a list the message cannot say what the folder holds.
        if "://" in folder.path:
            return []
        raise


def _no_weights(spec: str, names: Sequence[str], below: Sequence[str]) -> CheckpointError:
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES) and name != "training_args.bin"]
    others = [name for name in names if name.endswith(".safetensors")]
    if {PICKLES.single, PICKLES.index} & set(names):
        return CheckpointError(f"{spec!r} has pickle weights only ({', '.join(pickles[:3])}). {_ALLOW_PICKLE}")
    if pickles:
        return CheckpointError(
            f"{spec!r} has pickle weights only ({', '.join(pickles[:3])}), under names that transformers does not "
            f"load. If one holds all tensors of the model by name, call it {PICKLES.single} and pass --allow-pickle."
        )
    if others:
        return CheckpointError(
            f"{spec!r} holds neither {' nor '.join(WEIGHTS)}, but {', '.join(others[:3])}. Pass a folder that "
            "`save_pretrained` wrote."
        )
    if below:
        return CheckpointError(
            f"{spec!r} holds no model itself, but there {'is one' if len(below) == 1 else 'are models'} in folders "
            f"below it. Pass {_either(f'{spec}/{name}' for name in below)}."
        )
    if names:
        return CheckpointError(
            f"{spec!r} holds no weights: expected {' or '.join(WEIGHTS)}, found {', '.join(names[:5])}."
        )
    if "://" in spec:
        return CheckpointError(
            f"{spec!r}: neither {' nor '.join(WEIGHTS)} was found there. Check the address, and that you may read it."
        )
    return CheckpointError(f"{spec!r} is empty: expected {' or '.join(WEIGHTS)} and a config.json.")
