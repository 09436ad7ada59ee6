"""Write a LoRA adapter in PEFT's layout, module by module, without a model in memory."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.adapters.config import CONFIG_NAME
from hf_frmerge.checkpoints.disk import make_folder, remove_file, remove_folder, rename, write_file
from hf_frmerge.checkpoints.tensors.floats import DTYPE_CODES, dtypes_that_hold, narrow, widen
from hf_frmerge.checkpoints.tensors.layout import ShardLayout
from hf_frmerge.checkpoints.tensors.reader import ADAPTER_FILE
from hf_frmerge.checkpoints.tensors.writer import STAGING, CheckpointWriter, remove_staging
from hf_frmerge.errors import NonFiniteError

_KEYS = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "conv": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}

# Fields that say how a source adapter was trained, or how it chose its modules. They do not hold for the result.
_RESET: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "inference_mode": True,
    "modules_to_save": None,
    "ensure_weight_tying": False,  # both modules have factors in the file
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}


@dataclass(frozen=True)
class AdapterModule:
    """
    One module of a new adapter.

    Attributes:
        module: path in the base model.
        kind: `"linear"`, `"embedding"` or `"conv"`.
        rank: rank of its factors; its scale is 1.
        n_out: rows of `up`.
        input_shape: `(n_in,)`, or `(n_in, *kernel)` for a convolution.
    """

    module: str
    kind: Literal["linear", "embedding", "conv"]
    rank: int
    n_out: int
    input_shape: tuple[int, ...]

    @property
    def keys(self) -> tuple[str, str]:
        """Names of `down` and `up` in the file."""
        down, up = _KEYS[self.kind]
        return f"base_model.model.{self.module}{down}", f"base_model.model.{self.module}{up}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `down` and `up` in the file."""
        return (self.rank, *self.input_shape), (self.n_out, self.rank, *(1 for _ in self.input_shape[1:]))


def make_config(source: Mapping[str, Any], modules: Sequence[AdapterModule]) -> dict[str, Any]:
    """
    Make the `adapter_config.json` of a new adapter, in which PEFT gives every module scale 1.

    Args:
        source (`Mapping[str, Any]`):
            Configuration of a source adapter. Its base model, revision, task and `fan_in_fan_out` are kept.
        modules (`Sequence[AdapterModule]`):
            Modules with their ranks.
    """
    common = Counter(module.rank for module in modules).most_common(1)[0][0]
    # PEFT matches these keys as regular expressions at the end of a module path; "^" makes each match one path only.
    ranks = {"^" + re.escape(module.module): module.rank for module in modules if module.rank != common}
    return {
        **source,
        **_RESET,
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(module.module for module in modules),
    }


class AdapterWriter:
    """
    Writer of a new adapter: factors go to a temporary file, which `publish` renames.

    The caller writes the configuration after that: without it no loader takes the folder for an adapter.

    Args:
        output_dir (`str` or `Path`):
            Folder of the finished adapter; created if needed.
        dtype (`str`):
            Safetensors code of the factors: `"BF16"`, `"F16"`, `"F32"` or `"F64"`.
    """

    def __init__(self, output_dir: str | Path, dtype: str) -> None:
        self.output_dir = Path(output_dir)
        self.staging = self.output_dir / STAGING
        self.dtype = dtype
        self.config: dict[str, Any] = {}
        self._writer: CheckpointWriter | None = None

    def lay_out(self, modules: Sequence[AdapterModule], config: Mapping[str, Any]) -> None:
        """
        Create the file, or open the one of an earlier run if it has the same layout.

        Args:
            modules (`Sequence[AdapterModule]`):
                Modules that will be written.
            config (`Mapping[str, Any]`):
                Result of `make_config`.
        """
        self.config = dict(config)
        tensors = [(key, self.dtype, shape) for module in modules for key, shape in zip(module.keys, module.shapes)]
        nbytes = 8 * sum(int(np.prod(shape)) for _, _, shape in tensors)
        layout = ShardLayout.plan(tensors, max(nbytes, 1))  # one file: PEFT does not shard
        layout = replace(layout, shards=(replace(layout.shards[0], file=ADAPTER_FILE),))
        self._writer = CheckpointWriter(layout, self.output_dir)
        self._writer.reopen()

    def write(
        self, module: AdapterModule, up: NDArray[np.floating], down: NDArray[np.floating]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """
        Write the factors of one module and return the bytes of `down` and `up`; from any thread.

        Raises:
            NonFiniteError: If a value does not fit into the adapter's dtype.
            MergeError: If the disk is full.
        """
        written = []
        for key, values in zip(module.keys, (down, up)):
            with np.errstate(over="ignore"):  # an overflow is checked for below
                written.append(narrow(values, self.dtype))
            if not np.isfinite(widen(written[-1], self.dtype)).all():
                raise self._not_finite(module, float(np.abs(values).max()))
            self._file.write(key, 0, written[-1])
        return written[0], written[1]

    def _not_finite(self, module: AdapterModule, peak: float) -> NonFiniteError:
        dtype = next(name for name, code in DTYPE_CODES.items() if code == self.dtype)
        wider = dtypes_that_hold(peak)
        advice = f"Write it with dtype={wider[0]!r}; or choose" if wider else "Choose"
        return NonFiniteError(
            f"Module {module.module!r}: a factor of the new adapter holds {peak:.3g}, more than {dtype} can. {advice} "
            "a smaller scale, or a beta nearer to 0, or lower the lora_alpha of what it was made from."
        )

    def read_back(self, module: AdapterModule) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Read the bytes of `down` and `up` of a module from the unfinished file; from any thread."""
        down, up = (self._file.read_back(key, 0, self._file.layout.nbytes[key]) for key in module.keys)
        return down, up

    def sync(self) -> None:
        """Sync the file to disk and close it."""
        self._file.sync()

    def publish(self) -> None:
        """Rename the weights into place. The folder is an adapter only once its configuration is there, too."""
        self._file.publish()

    def write_config(self) -> Path:
        """Write the configuration into the staging folder and return its path; renaming it is the last step."""
        path = self.staging / CONFIG_NAME
        write_file(path, json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        return path

    def close(self) -> None:
        """Close the file; it stays for a resume."""
        if self._writer is not None:
            self._writer.close()

    @property
    def _file(self) -> CheckpointWriter:
        assert self._writer is not None, "lay_out comes first"
        return self._writer


@contextmanager
def new_adapter(
    output_dir: str | Path, modules: Sequence[AdapterModule], config: Mapping[str, Any], dtype: str
) -> Iterator[AdapterWriter]:
    """Open a writer for a new adapter; it is published at the end of the block, or removed if the block raises."""
    writer = AdapterWriter(output_dir, dtype)
    remove_folder(writer.staging)
    make_folder(writer.staging)
    try:
        writer.lay_out(modules, config)
        yield writer
        writer.sync()
        remove_file(writer.output_dir / CONFIG_NAME)  # so that a half-replaced adapter cannot be loaded
        writer.publish()
        rename(writer.write_config(), writer.output_dir / CONFIG_NAME)
    finally:
        writer.close()
        remove_staging(writer.staging)
