"""Read safetensors checkpoints by byte ranges: headers first and checked, contents only when asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.folders import LocalFolder, RemoteFolder, open_folder
from hf_frmerge.checkpoints.page_cache import Mapping
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.header import DTYPE_BITS, FLOAT_DTYPES, TensorInfo, read_header
from hf_frmerge.checkpoints.tensors.wrappers import unwrapped
from hf_frmerge.errors import CheckpointError

__all__ = [
    "ADAPTER_FILE",
    "DTYPE_BITS",
    "FLOAT_DTYPES",
    "INDEX_FILE",
    "SINGLE_FILE",
    "Checkpoint",
    "TensorInfo",
    "open_checkpoint",
    "read_file",
    "read_json",
    "some",
    "unchanged",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILES = {"full": "config.json", "adapter": "adapter_config.json"}


class Checkpoint:
    """
    Weights of one expert, base model or adapter. Contents are read on demand; any thread may read.

    Args:
        source (`Source`):
            Where the checkpoint came from; its `spec` names it in errors.
        folder (`LocalFolder` or `RemoteFolder`):
            The files.
        tensors (`dict[str, TensorInfo]`):
            All tensors by name, in file order.
        files (`dict[str, int]`):
            Weight files and their sizes in bytes.
        identities (`dict[str, str]`):
            What told every file of the folder that is read from a changed one before it was read.

    Attributes:
        wrapped (`str`, *optional*): a tensor's name in the file, if wrappers were taken off the names (`unwrapped`).
    """

    def __init__(
        self,
        source: Source,
        folder: LocalFolder | RemoteFolder,
        tensors: dict[str, TensorInfo],
        files: dict[str, int],
        identities: dict[str, str],
    ) -> None:
        self.source = source
        self.folder = folder
        self.tensors = tensors
        self.files = files
        self._identities = identities
        self.aliases: dict[str, str] = {}
        self.wrapped: str | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together, without headers."""
        return sum(info.nbytes for name, info in self.tensors.items() if name not in self.aliases)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """
        Read bytes `[start, stop)` of a tensor.

        Args:
            name (`str`):
                Tensor name.
            start (`int`, *optional*, defaults to 0):
                First byte, counted from the start of the tensor.
            stop (`int`, *optional*):
                Byte after the last; by default the end of the tensor.

        Returns:
            `numpy.ndarray`: Read-only uint8, 1-D. For local files a view of the page cache, not a copy.

        Raises:
            CheckpointError: If the file is gone, was changed, or cannot be read.
        """
        info = self.tensors[name]
        stop = info.nbytes if stop is None else stop
        if not 0 <= start <= stop <= info.nbytes:
            raise ValueError(f"Bytes {start} to {stop} are outside tensor {name!r} of {info.nbytes} bytes.")
        try:
            return self.folder.view(info.file, self.files[info.file], info.offset + start, info.offset + stop)
        except OSError as error:
            raise CheckpointError(
                f"{self.source.spec!r}, tensor {name!r}: bytes {start} to {stop} of {info.nbytes} could not be "
                f"read from {self.folder.path}/{info.file}: {_reason(error)}. Bring the file back (or download it "
                "again) and resume."
            ) from error

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give back the memory pages of a range that was read; the system's page cache keeps the contents."""
        info = self.tensors[name]
        stop = info.nbytes if stop is None else stop
        self.folder.release(info.file, info.offset + start, info.offset + stop)

    def mapping(self, name: str) -> Mapping | None:
        """Return the mapped file a tensor lies in; `None` if it is remote, or for a reason that `read` will meet."""
        file = self.tensors[name].file
        if isinstance(self.folder, RemoteFolder):
            return None
        with suppress(OSError):
            return self.folder.mapping(file, self.files[file])
        return None

    def alias(self, name: str, target: str) -> None:
        """Let `name` read the contents of tensor `target`: a tied weight that other checkpoints store twice."""
        info = self.tensors[target]
        self.tensors[name] = TensorInfo(name, info.dtype, info.shape, info.file, info.offset, info.nbytes)
        self.aliases[name] = target

    def fingerprint(self) -> list[tuple[str, int, str]]:
        """
        Tell the weight files apart from rewritten ones, without reading them.

        Returns:
            `list[tuple[str, int, str]]`: Per file its name, its size in bytes, and its `identity` in the folder, when
            the checkpoint was opened.
        """
        return [(file, self.files[file], self._identities[file]) for file in sorted(self.files)]

    def watch(self, names: Iterable[str]) -> None:
        """Have `check_unchanged` look at other files of the folder, too."""
        try:
            self._identities |= {name: self.folder.identity(name) for name in names}
        except OSError as error:
            raise CheckpointError(f"{self.source.spec!r} could not be opened: {_reason(error)}.") from error

    def check_unchanged(self, files: Iterable[str] | None = None) -> None:
        """
        Refuse files that are not what they were when the checkpoint was opened. For a local file this takes a stat.

        What was read before a call that succeeds is from the file as it was opened.

        Args:
            files (`Iterable[str]`, *optional*):
                Some of the files that are read; by default all.

        Raises:
            CheckpointError: If one was rewritten, cut short, replaced or removed, or its disk failed.
        """
        for name in self._identities if files is None else files:
            change = self._change(name)
            if change:
                raise CheckpointError(
                    f"{self.source.spec!r}: {self.folder.path}/{name} changed while it was in use: {change}. Bring "
                    "the file back as it was and resume (--resume, resume_from_checkpoint=True), or start anew with "
                    "what is there now (--overwrite)."
                )

    def _change(self, name: str) -> str:
        """How a file differs from what it was; empty if it does not."""
        try:
            if self.folder.identity(name) != self._identities[name]:
                before, now = self.files.get(name), self.folder.size(name)
                return (
                    "it was rewritten or replaced"
                    if before in (None, now)
                    else f"it had {before} bytes and now has {now}"
                )
        except OSError as error:
            return f"it cannot be found any more ({_reason(error)})"
        broken = isinstance(self.folder, LocalFolder) and self.folder.is_broken(name)
        return "a part of it could not be read from the disk" if broken else ""

    def config(self) -> dict[str, Any]:
        """Parsed `config.json`, empty if there is none."""
        return read_json(self.folder, "config.json", self.source.spec)

    def close(self) -> None:
        """Forget open files. Arrays from `read` stay valid."""
        self.folder.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def unchanged(checkpoints: Iterable[Checkpoint]) -> Iterator[None]:
    """
    Refuse, when the block ends, checkpoints whose files changed while it ran; see `Checkpoint.check_unchanged`.

    Whatever else goes wrong in the block is raised only if none did: a changed file explains every other error.
    """
    opened = list(checkpoints)
    try:
        yield
    except Exception:
        for checkpoint in opened:
            checkpoint.check_unchanged()
        raise
    for checkpoint in opened:
        checkpoint.check_unchanged()


def open_checkpoint(source: Source) -> Checkpoint:
    """
    Read and check the headers of a checkpoint, single file or sharded, full model or adapter.

    Tensors go by their names in the model: what `torch.compile` or DDP put before them is taken off.

    Args:
        source (`Source`):
            What `resolve` returned.

    Returns:
        `Checkpoint`: Tensors in file order; contents not read yet.

    Raises:
        CheckpointError: If a file is missing, truncated or not safetensors, or the index disagrees with the shards.
    """
    folder = open_folder(source.path)
    spec = source.spec
    try:
        if source.kind == "adapter":
            return _checked(_open_files(source, folder, [ADAPTER_FILE]))
        if folder.exists(SINGLE_FILE):
            # transformers, too, prefers the single file when a folder holds both.
            return _checked(_open_files(source, folder, [SINGLE_FILE]))
        if not folder.exists(INDEX_FILE):
            raise CheckpointError(
                f"{spec!r} holds neither {SINGLE_FILE} nor {INDEX_FILE}. Pass a folder that `save_pretrained` wrote."
            )
        weight_map = _weight_map(folder, spec)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            _refuse_outside(shard, spec)
            if not folder.exists(shard):
                raise CheckpointError(
                    f"{spec!r}: {INDEX_FILE} names the shard {shard!r}, which is not in the folder "
                    f"({len(shards)} shards named). Copy or download the missing shard."
                )
        checkpoint = _open_files(source, folder, shards)
    except OSError as error:
        raise CheckpointError(f"{spec!r} could not be opened: {_reason(error)}.") from error
    _check_index(checkpoint, weight_map)
    return _checked(checkpoint)


def read_file(folder: LocalFolder | RemoteFolder, name: str, spec: str) -> bytes:
    """Contents of a small file of a checkpoint; `spec` names it in errors."""
    try:
        return folder.read(name)
    except OSError as error:
        raise CheckpointError(f"{spec!r}: {name} could not be read: {_reason(error)}.") from error


def read_json(folder: LocalFolder | RemoteFolder, name: str, spec: str) -> dict[str, Any]:
    """Parse a JSON object in the folder; empty if there is no such file."""
    try:
        if not folder.exists(name):
            return {}
    except OSError as error:
        raise CheckpointError(f"{spec!r}: {name} could not be read: {_reason(error)}.") from error
    try:
        parsed = json.loads(read_file(folder, name, spec))
    except ValueError as error:
        raise CheckpointError(f"{spec!r}: {name} is not valid JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{spec!r}: {name} must hold a JSON object, found a {type(parsed).__name__}.")
    return parsed


def some(items: Iterable[object], limit: int = 3) -> str:
    """List the first few items for a message, and count the rest."""
    shown = [str(item) for item in items]
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _open_files(source: Source, folder: LocalFolder | RemoteFolder, files: list[str]) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    beside = [name for name in (INDEX_FILE, CONFIG_FILES[source.kind]) if folder.exists(name)]
    identities = {name: folder.identity(name) for name in (*files, *beside)}
    for file in files:
        infos, sizes[file] = read_header(folder, file, source.spec)
        for info in infos:
            if info.name in tensors:
                raise CheckpointError(
                    f"{source.spec!r}: tensor {info.name!r} is stored twice, in {tensors[info.name].file} and {file}."
                )
            tensors[info.name] = info
    if not tensors:
        raise CheckpointError(f"{source.spec!r} holds no tensors ({some(files)}).")
    return Checkpoint(source, folder, tensors, sizes, identities)


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    _refuse_empty(checkpoint)
    tensors: dict[str, TensorInfo] = {}
    for stored, name in unwrapped(checkpoint.tensors).items():
        if name in tensors:
            raise CheckpointError(
                f"{checkpoint.source.spec!r}: without the names that torch.compile, DDP or FSDP put into it, "
                f"{stored!r} is {name!r}, which is stored as well. Save the model inside the wrapper "
                "(`model._orig_mod`, `model.module`) again."
            )
        info = checkpoint.tensors[stored]
        if name != stored:
            checkpoint.wrapped = checkpoint.wrapped or stored
            info = replace(info, name=name)
        tensors[name] = info
    checkpoint.tensors = tensors
    return checkpoint


def _refuse_empty(checkpoint: Checkpoint) -> None:
    # One dimension of no elements is what is left of a weight whose elements are on other processes. A matrix of no
    # rows has its shape still, and may be meant.
    empty = [info.name for info in checkpoint.tensors.values() if info.is_float and info.shape == (0,)]
    if empty:
        raise CheckpointError(
            f"{checkpoint.source.spec!r} holds tensors of shape [0]: {some(empty)}. It was saved by a sharded run "
            "(DeepSpeed ZeRO-3, FSDP) that did not gather its weights first. Make whole weights of the run's own "
            "checkpoint with the `zero_to_fp32.py` that lies in it, or save again with "
            '`"stage3_gather_16bit_weights_on_model_save": true` in the DeepSpeed config (of FSDP: with '
            "`FULL_STATE_DICT`)."
        )


def _weight_map(folder: LocalFolder | RemoteFolder, spec: str) -> dict[str, str]:
    weight_map = read_json(folder, INDEX_FILE, spec).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{spec!r}: {INDEX_FILE} has no `weight_map` from tensor names to shards.")
    wrong = [name for name, file in weight_map.items() if not isinstance(file, str)]
    if wrong:
        raise CheckpointError(f"{spec!r}: {INDEX_FILE} maps {some(wrong)} to something that is not a file name.")
    return weight_map


def _refuse_outside(file: str, spec: str) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or ":" in file or path.name != file:
        raise CheckpointError(
            f"{spec!r}: {INDEX_FILE} names {file!r}, which is not a file of the folder itself. Shards must lie beside "
            "the index; nothing outside is read."
        )


def _check_index(checkpoint: Checkpoint, weight_map: dict[str, str]) -> None:
    spec = checkpoint.source.spec
    misplaced = [
        f"{name!r} ({file})"
        for name, file in weight_map.items()
        if name not in checkpoint.tensors or checkpoint.tensors[name].file != file
    ]
    if misplaced:
        raise CheckpointError(
            f"{spec!r}: {INDEX_FILE} lists {len(misplaced)} tensors that are not in the shard it names: "
            f"{some(misplaced)}. The index belongs to other shards; download the folder again."
        )
    unlisted = [f"{name!r} ({info.file})" for name, info in checkpoint.tensors.items() if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            f"{spec!r}: the shards hold {len(unlisted)} tensors that {INDEX_FILE} does not list: {some(unlisted)}. "
            "The index belongs to other shards; download the folder again."
        )


def _reason(error: OSError) -> str:
    text = error.strerror or str(error) or type(error).__name__
    return f"{text} ({error.filename})" if error.filename else text
