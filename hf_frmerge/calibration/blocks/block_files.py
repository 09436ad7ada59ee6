"""Keep what is fitted block by block, so that an interrupted calibration goes on, and join it into one file."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from hf_frmerge.calibration.kept_files import damaged, read_kept, tensors_digest, write_kept
from hf_frmerge.calibration.sweep import FittedBlock
from hf_frmerge.checkpoints.disk import make_folder, remove_file, write_file
from hf_frmerge.checkpoints.tensors.layout import ShardLayout
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_tensors_file
from hf_frmerge.errors import ResumeError
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE, Form

_KEY_FILE = "calibration-key.json"
_DIGEST = "xxh3_128"
_OTHER = {"up": "down", "down": "up"}
_COEFFICIENTS = ".coefficients"


class BlockFiles:
    """
    Corrections of the blocks fitted so far, one file each, in the staging folder.

    Args:
        folder: The staging folder.
        key: Everything the fit depends on.

    Raises:
        ResumeError: If the folder has blocks that were fitted with another key, or a damaged one.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self._folder = folder
        make_folder(folder)
        path, now = folder / _KEY_FILE, json.loads(json.dumps(key))  # as it would be read back: tuples become lists
        if not path.exists():
            write_kept(path, now)
            return
        before = read_kept(path)
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            raise ResumeError(
                f"The interrupted calibration in {folder.parent} was started differently ({', '.join(changed)}). "
                "Start it the same way, or pass --overwrite to start anew."
            )

    def read(self, index: int, names: Mapping[str, str]) -> FittedBlock | None:
        """
        Return what an earlier run found for a block; `None` if it did not come that far.

        Args:
            index: Number of the block; that of the head is the next one.
            names: Parameter of the block -> its tensor.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as stored:
                tensors = set(stored.keys())
                digest = (stored.metadata() or {}).get(_DIGEST)
                if digest != tensors_digest({name: stored.get_tensor(name) for name in tensors}):
                    raise damaged(path, "its digest is of other content")
                corrections = {name: stored.get_tensor(t) for name, t in names.items() if t in tensors}
                factors = {
                    name: (stored.get_tensor(f"{t}.up"), stored.get_tensor(f"{t}.down"))
                    for name, t in names.items()
                    if f"{t}.up" in tensors
                }
                coefficients = {
                    name: stored.get_tensor(f"{t}{_COEFFICIENTS}")
                    for name, t in names.items()
                    if f"{t}{_COEFFICIENTS}" in tensors
                }
        except SafetensorError as error:
            raise damaged(path, error) from error
        return FittedBlock(corrections, factors, coefficients)

    def write(self, index: int, names: Mapping[str, str], block: FittedBlock) -> None:
        """Keep what was found for a block."""
        tensors = {names[name]: values for name, values in block.corrections.items()}
        for name, (up, down) in block.factors.items():
            tensors |= {f"{names[name]}.up": up, f"{names[name]}.down": down}
        tensors |= {f"{names[name]}{_COEFFICIENTS}": values for name, values in block.coefficients.items()}
        tensors = {name: values.cpu().contiguous() for name, values in tensors.items()}
        write_file(self._path(index), save(tensors, {_DIGEST: tensors_digest(tensors)}))

    def join(self, n_parts: int, form: Form) -> None:
        """
        Join the corrections of all blocks, in one form, into one file (none for the start and the table).

        Args:
            n_parts: Number of blocks, and of a head behind them.
            form: Which of what was found is written.
        """
        if form not in ("start", "table"):
            opened = [open_tensors_file(str(self._folder), self._path(index).name) for index in range(n_parts)]
            _join(
                [(block, name) for block in opened for name in _of_form(block, form)], self._folder / CORRECTIONS_FILE
            )
            for block in opened:
                block.close()

    def join_for_adapter(self, n_blocks: int, transposed: Collection[str]) -> None:
        """
        Join the factors of all blocks into one file, as adapters lay them out.

        Args:
            n_blocks: Number of blocks.
            transposed: Tensors that the model stores as `(n_in, n_out)`, as GPT-2 does.
        """
        factors: dict[str, Tensor] = {}
        for index in range(n_blocks):
            factors |= factors_for_adapter(load_file(self._path(index)), transposed)
        write_file(self._folder / CORRECTIONS_FILE, save(factors))

    def remove(self, n_parts: int) -> None:
        """Remove what was kept of the blocks, and the head behind them."""
        for index in range(n_parts):
            remove_file(self._path(index))

    def _path(self, index: int) -> Path:
        return self._folder / f"calibrated-{index:04d}.safetensors"


def factors_for_adapter(corrections: Mapping[str, Tensor], transposed: Collection[str]) -> dict[str, Tensor]:
    """Return the factors among corrections as adapters lay them out; arguments as for `join_for_adapter`."""
    factors = {}
    for name, values in corrections.items():
        tensor, _, factor = name.rpartition(".")
        if factor in _OTHER and tensor in transposed:
            factors[f"{tensor}.{_OTHER[factor]}"] = values.T.contiguous()
        elif factor in _OTHER:
            factors[name] = values
    return factors


def _of_form(block: Checkpoint, form: Form) -> list[str]:
    """Return the tensors of a block's file that belong to a form: of a layer with factors one kind or the other."""
    corrections = [name for name in block.tensors if not name.endswith(_COEFFICIENTS)]
    if form == "dense":
        return [name for name in corrections if not name.endswith((".up", ".down"))]
    return [name for name in corrections if f"{name}.up" not in block.tensors]


def _join(parts: list[tuple[Checkpoint, str]], path: Path) -> None:
    where = {name: block for block, name in parts}
    infos = [block.tensors[name] for block, name in parts]
    (shard,) = ShardLayout.plan([(info.name, info.dtype, info.shape) for info in infos], 1 << 62).shards
    write_file(path, chain([shard.header], (where[name].read(name).data for name in shard.names)))
