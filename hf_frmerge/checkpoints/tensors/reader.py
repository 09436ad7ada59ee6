"""Read checkpoints by byte ranges: headers are read and checked first, contents only on demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.page_cache import Mapping
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.checkpoints.source import SAFETENSORS, Source, gguf_parts
from hf_frmerge.checkpoints.tensors.gguf_tensors import read_gguf
from hf_frmerge.checkpoints.tensors.header import DTYPE_BITS, FLOAT_DTYPES, TensorInfo, read_header
from hf_frmerge.checkpoints.tensors.pickles import read_pickle
from hf_frmerge.checkpoints.tensors.shard_index import check_index, weight_map
from hf_frmerge.checkpoints.tensors.small_files import CONFIG_FILES, read_config, reason
from hf_frmerge.checkpoints.tensors.wrappers import unwrapped
from hf_frmerge.errors import CheckpointError, some

__all__ = [
    "ADAPTER_FILE",
    "DTYPE_BITS",
    "FLOAT_DTYPES",
    "SINGLE_FILE",
    "Checkpoint",
    "TensorInfo",
    "open_checkpoint",
    "open_tensors_file",
    "some",
    "unchanged",
]

SINGLE_FILE = SAFETENSORS.single
ADAPTER_FILE = SAFETENSORS.adapter


class Checkpoint:
    """
    Weights of one expert, base model or adapter. Contents are read on demand, from any thread.

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
            `identity` of every file that is read, taken before it was read: if one differs later, the file changed.

    Attributes:
        aliases (`dict[str, str]`): names added by `alias`, and the tensor each one reads.
        row_maps (`dict[str, NDArray[numpy.int64]]`): for tensors whose rows are not taken as they are stored: the
            stored index of every row, -1 for a row that is not stored and has to be filled.
        quantisation (`str`, *optional*): what its weights were dequantised from, if they were.
        largest_computed (`int`): bytes that it takes to compute the largest of these weights.
        unused (`dict[str, TensorInfo]`): stored tensors that only codes need, such as scales of activations.
        wrapped (`str`, *optional*): example of a stored name, if wrappers were removed from the names (`unwrapped`).
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
        self.row_maps: dict[str, NDArray[np.int64]] = {}
        self.quantisation: str | None = None
        self.largest_computed = 0
        self.unused: dict[str, TensorInfo] = {}
        self.wrapped: str | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all stored tensors together, without headers."""
        return sum(info.nbytes for info in self.stored)

    @property
    def stored(self) -> list[TensorInfo]:
        """The tensors in the files, each once: those of `tensors`, or what they are made of."""
        logical = [*(info for name, info in self.tensors.items() if name not in self.aliases), *self.unused.values()]
        return list({(each.file, each.offset, each.name): each for info in logical for each in info.stored}.values())

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
            CheckpointError: If the file is gone, has changed, or cannot be read.
        """
        return self.read_info(self.tensors[name], start, stop)

    def read_info(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Read bytes `[start, stop)` of a tensor that may be a part of another, and so none of `tensors`."""
        stop = info.nbytes if stop is None else stop
        if not 0 <= start <= stop <= info.nbytes:
            raise ValueError(f"Bytes {start} to {stop} are outside tensor {info.name!r} of {info.nbytes} bytes.")
        if info.recipe is not None:
            return info.recipe.read(self, start, stop)
        try:
            return self.folder.view(info.file, self.files[info.file], info.offset + start, info.offset + stop)
        except OSError as error:
            raise CheckpointError(
                f"{self.source.spec!r}, tensor {info.name!r}: bytes {start} to {stop} of {info.nbytes} could not be "
                f"read from {self.folder.path}/{info.file}: {reason(error)}. Bring the file back (or download it "
                "again) and resume."
            ) from error

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Unmap the pages of a range that was read; the system's page cache keeps the contents."""
        self.release_info(self.tensors[name], start, stop)

    def release_info(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> None:
        """Do what `release` does, for a tensor that may be a part of another; what is computed maps no pages."""
        stop = info.nbytes if stop is None else stop
        if info.recipe is None:
            self.folder.release(info.file, info.offset + start, info.offset + stop)

    def mapping(self, info: TensorInfo) -> Mapping | None:
        """
        Return the mapping of a tensor's file.

        `None` if it is made of other tensors, is remote, or cannot be mapped (`read` will say why).
        """
        if isinstance(self.folder, RemoteFolder) or info.recipe is not None:
            return None
        with suppress(OSError):
            return self.folder.mapping(info.file, self.files[info.file])
        return None

    def alias(self, name: str, target: str) -> None:
        """Add a tensor `name` with the contents of `target`: a tied weight that other checkpoints store twice."""
        self.tensors[name] = replace(self.tensors[target], name=name)
        self.aliases[name] = target

    def fingerprint(self) -> list[tuple[str, int, str]]:
        """
        Return marks that change when a weight file is rewritten, without reading the files.

        Returns:
            `list[tuple[str, int, str]]`: For each file its name, its size in bytes and its `identity`, all from when
            the checkpoint was opened.
        """
        return [(file, self.files[file], self._identities[file]) for file in sorted(self.files)]

    def watch(self, names: Iterable[str]) -> None:
        """Make `check_unchanged` check further files of the folder."""
        try:
            self._identities |= {name: self.folder.identity(name) for name in names}
        except OSError as error:
            raise CheckpointError(f"{self.source.spec!r} could not be opened: {reason(error)}.") from error

    def check_unchanged(self, files: Iterable[str] | None = None) -> None:
        """
        Check that files have not changed since the checkpoint was opened; costs one `stat` for each local file.

        If it succeeds, everything read so far came from the files as they were opened.

        Args:
            files (`Iterable[str]`, *optional*):
                Files to check; by default all that are read.

        Raises:
            CheckpointError: If a file was rewritten, truncated, replaced or removed, or its disk failed.
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
        """Describe how a file has changed; empty if it has not."""
        try:
            if self.folder.identity(name) != self._identities[name]:
                before, now = self.files.get(name), self.folder.size(name)
                return (
                    "it was rewritten or replaced"
                    if before in (None, now)
                    else f"it had {before} bytes and now has {now}"
                )
        except OSError as error:
            return f"it cannot be found any more ({reason(error)})"
        broken = isinstance(self.folder, LocalFolder) and self.folder.is_broken(name)
        return "a part of it could not be read from the disk" if broken else ""

    def config(self) -> dict[str, Any]:
        """Return the parsed `config.json`, empty if there is none."""
        return read_config(self.folder, self.source.spec)

    def close(self) -> None:
        """Close open files. Arrays from `read` stay valid."""
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
    Check at the end of a `with` block that no file changed while it ran; see `Checkpoint.check_unchanged`.

    If the block raises, the files are checked first: a changed file explains any other error, and its message helps
    the user more.
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

    Tensors get their names in the model: prefixes from `torch.compile`, DDP and the like are removed.

    Args:
        source (`Source`):
            What `resolve` returned.

    Returns:
        `Checkpoint`: Tensors in file order; their contents are not read yet.

    Raises:
        CheckpointError: If a file is missing, damaged or not what its name says, or the index disagrees with shards.
    """
    folder, files = open_folder(source.path), source.weight_files
    spec = source.spec
    try:
        if source.kind == "adapter":
            return _checked(_open_files(source, folder, [files.adapter]))
        if source.is_gguf:
            return _checked(_open_files(source, folder, _all_parts(source, folder)))
        if folder.exists(files.single):
            # transformers also prefers the single file when a folder holds both.
            return _checked(_open_files(source, folder, [files.single]))
        if not folder.exists(files.index):
            raise CheckpointError(
                f"{spec!r} holds neither {files.single} nor {files.index}. Pass a folder that `save_pretrained` wrote."
            )
        placed = weight_map(folder, spec, files.index)
        shards = sorted(set(placed.values()))
        for shard in shards:
            if not folder.exists(shard):
                raise CheckpointError(
                    f"{spec!r}: {files.index} names the shard {shard!r}, which is not in the folder "
                    f"({len(shards)} shards named). Copy or download the missing shard."
                )
        checkpoint = _open_files(source, folder, shards)
    except OSError as error:
        raise CheckpointError(f"{spec!r} could not be opened: {reason(error)}.") from error
    check_index(checkpoint.tensors, placed, spec, files.index)
    return _checked(checkpoint)


def open_tensors_file(path: str, file: str) -> Checkpoint:
    """
    Open one safetensors file that is no model, such as a part of a merge's record.

    Raises:
        CheckpointError: If it is missing, truncated or not safetensors.
    """
    folder, source = open_folder(path), Source(path, "full", path)
    try:
        identity = folder.identity(file)
        infos, size = read_header(folder, file, path)
    except OSError as error:
        raise CheckpointError(f"{path}/{file} could not be opened: {reason(error)}.") from error
    return Checkpoint(source, folder, {info.name: info for info in infos}, {file: size}, {file: identity})


def _all_parts(source: Source, folder: LocalFolder | RemoteFolder) -> list[str]:
    """Return the files of a model in GGUF files, all of which must be there."""
    parts = gguf_parts(source.weight_files.single)
    for part in parts:
        if not folder.exists(part):
            raise CheckpointError(
                f"{source.spec!r} is a model in {len(parts)} files, and {part!r} is not beside the others. Copy or "
                "download the missing file."
            )
    return parts


def _open_files(source: Source, folder: LocalFolder | RemoteFolder, files: list[str]) -> Checkpoint:
    # Identities are taken before the headers are read: a file that changes in between is noticed.
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[str, int] = {}
    beside = [name for name in (source.weight_files.index, CONFIG_FILES[source.kind]) if folder.exists(name)]
    identities = {name: folder.identity(name) for name in (*files, *beside)}
    read_tensors = read_gguf if source.is_gguf else read_pickle if source.is_pickled else read_header
    for file in files:
        infos, sizes[file] = read_tensors(folder, file, source.spec)
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
    # A sharded run that does not gather its weights saves them with shape [0]. An empty matrix still has two
    # dimensions, and may be intended.
    empty = [info.name for info in checkpoint.tensors.values() if info.is_float and info.shape == (0,)]
    if empty:
        raise CheckpointError(
            f"{checkpoint.source.spec!r} holds tensors of shape [0]: {some(empty)}. It was saved by a sharded run "
            "(DeepSpeed ZeRO-3, FSDP) that did not gather its weights first. Make whole weights of the run's own "
            "checkpoint with the `zero_to_fp32.py` that lies in it, or save again with "
            '`"stage3_gather_16bit_weights_on_model_save": true` in the DeepSpeed config (of FSDP: with '
            "`FULL_STATE_DICT`)."
        )
