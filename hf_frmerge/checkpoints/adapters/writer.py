"""Write a LoRA adapter in PEFT's layout, module by module, without a model in memory."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.adapters.config import CONFIG_NAME
from hf_frmerge.checkpoints.disk import remove_file, remove_folder, rename, write_file
from hf_frmerge.checkpoints.tensors.floats import DTYPE_CODES, dtypes_that_hold, narrow, widen
from hf_frmerge.checkpoints.tensors.reader import ADAPTER_FILE
from hf_frmerge.checkpoints.tensors.writer import CheckpointWriter, ShardLayout, remove_staging
from hf_frmerge.errors import NonFiniteError

_KEYS = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "conv": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}

# Fields of a source's configuration that say how it was trained or which modules it chose: not true of the result.
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
    One module of an adapter to be written.

    Attributes:
        module: path in the base model.
        kind: `"linear"`, `"embedding"` or `"conv"`.
        rank: rank of its factors; its scale will be 1.
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
    Return the `adapter_config.json` under which PEFT gives every module of the new adapter scale 1.

    Args:
        source (`Mapping[str, Any]`):
            Configuration of an adapter it was made from: its base model, revision, task and `fan_in_fan_out` stay.
        modules (`Sequence[AdapterModule]`):
            Modules with their ranks.
    """
    common = Counter(module.rank for module in modules).most_common(1)[0][0]
    # PEFT reads the keys as regular expressions for the end of a path; these match one path each.
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
    Writes factors under a temporary name, then renames the weights, and the configuration last.

    Use it as a context manager, `write` all modules, then `publish_weights`: leaving it without an error gives the
    configuration its name, an error removes the weights.

    Args:
        output_dir (`str` or `Path`):
            Folder of the finished adapter; created if needed.
        modules (`Sequence[AdapterModule]`):
            What will be written.
        config (`Mapping[str, Any]`):
            What `make_config` returned.
        dtype (`str`):
            Safetensors code of the factors: `"BF16"`, `"F16"`, `"F32"` or `"F64"`.
    """

    def __init__(
        self, output_dir: str | Path, modules: Sequence[AdapterModule], config: Mapping[str, Any], dtype: str
    ) -> None:
        self.output_dir = Path(output_dir)
        self.config = config
        self.dtype = dtype
        tensors = [(key, dtype, shape) for module in modules for key, shape in zip(module.keys, module.shapes)]
        nbytes = 8 * sum(int(np.prod(shape)) for _, _, shape in tensors)
        layout = ShardLayout.plan(tensors, max(nbytes, 1))  # one file: PEFT does not shard
        layout = replace(layout, shards=(replace(layout.shards[0], file=ADAPTER_FILE),))
        self._writer = CheckpointWriter(layout, self.output_dir)
        self._config_file = self._writer.staging / CONFIG_NAME
        self._is_published = False

    def __enter__(self) -> Self:
        remove_folder(self._writer.staging)
        self._writer.create()
        return self

    def write(self, module: AdapterModule, up: NDArray[np.floating], down: NDArray[np.floating]) -> None:
        """
        Write the factors of one module; from any thread.

        Raises:
            NonFiniteError: If a value does not fit into the adapter's dtype.
            MergeError: If the disk is full.
        """
        for key, values in zip(module.keys, (down, up)):
            with np.errstate(over="ignore"):  # looked at below
                narrowed = narrow(values, self.dtype)
            if not np.isfinite(widen(narrowed, self.dtype)).all():
                raise self._not_finite(module, float(np.abs(values).max()))
            self._writer.write(key, 0, narrowed)

    def _not_finite(self, module: AdapterModule, peak: float) -> NonFiniteError:
        dtype = next(name for name, code in DTYPE_CODES.items() if code == self.dtype)
        wider = dtypes_that_hold(peak)
        advice = f"Write it with dtype={wider[0]!r}; or choose" if wider else "Choose"
        return NonFiniteError(
            f"Module {module.module!r}: a factor of the new adapter holds {peak:.3g}, more than {dtype} can. {advice} "
            "a smaller scale, or a beta nearer to 0, or lower the lora_alpha of what it was made from."
        )

    def publish_weights(self) -> Path:
        """
        Make the weights durable and give them their name.

        Returns:
            `Path`: The configuration, which gets its own name when the context is left.
        """
        self._writer.sync()
        # Without its configuration an adapter cannot be loaded, so no half-replaced one ever is.
        remove_file(self.output_dir / CONFIG_NAME)
        self._is_published = True
        self._writer.publish()
        write_file(self._config_file, json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        return self._config_file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is None:
            rename(self._config_file, self.output_dir / CONFIG_NAME)
        elif self._is_published:
            remove_file(self.output_dir / ADAPTER_FILE)
            return  # the staging folder tells from now on that what else was written belongs to unfinished work
        remove_staging(self._writer.staging)
