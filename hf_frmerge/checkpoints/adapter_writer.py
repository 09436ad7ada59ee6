"""Write a LoRA adapter in PEFT's layout, module by module, without a model in memory."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.adapter_config import CONFIG_NAME
from hf_frmerge.checkpoints.floats import narrow
from hf_frmerge.checkpoints.reader import ADAPTER_FILE
from hf_frmerge.checkpoints.writer import CheckpointWriter, ShardLayout
from hf_frmerge.errors import MergeError

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

    Use it as a context manager: leaving it without an error finishes the adapter, an error removes what was written.

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

    def __enter__(self) -> Self:
        self._writer.create()
        return self

    def write(self, module: AdapterModule, up: NDArray[np.floating], down: NDArray[np.floating]) -> None:
        """
        Write the factors of one module; from any thread.

        Raises:
            MergeError: If a value does not fit into fp16, or the disk is full.
        """
        for key, values in zip(module.keys, (down, up)):
            if self.dtype == "F16" and values.size and np.abs(values).max() > np.finfo(np.float16).max:
                raise MergeError(
                    f"Module {module.module!r}: a factor of the merged adapter holds {np.abs(values).max():.3g}, more "
                    "than fp16 can. Write it with dtype='bfloat16' or 'float32'."
                )
            self._writer.write(key, 0, narrow(values, self.dtype))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._writer.sync()
                # Without its configuration an adapter cannot be loaded, so no half-replaced one ever is.
                (self.output_dir / CONFIG_NAME).unlink(missing_ok=True)
                self._writer.publish()
                text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
                self._writer.small_file(CONFIG_NAME, text)
        finally:
            self._writer.close()
            shutil.rmtree(self._writer.staging)
