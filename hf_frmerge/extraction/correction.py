"""Read the factors that a fit added to a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE, read_corrections

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint

Factors = tuple[NDArray[np.floating], NDArray[np.floating]]


def read_correction(merged: Checkpoint) -> dict[str, Factors]:
    """
    Return by tensor what a fit added to it, as factors `(rows, k)` and `(k, columns)`.

    Raises:
        CheckpointError: If the model is no merge that was fitted to its experts in this form.
    """
    if not open_folder(merged.source.path).exists(CORRECTIONS_FILE):
        raise CheckpointError(
            f"{merged.source.spec!r} has no {CORRECTIONS_FILE}: it is no merge that a fit added something to. Merge "
            "with --calibration and --calibration-form low_rank (calibration_form)."
        )
    stored = read_corrections(merged.source.path).checkpoint
    try:
        names = [name.removesuffix(".up") for name in stored.tensors if name.endswith(".up")]
        if not names:
            raise CheckpointError(
                f"The fit of {merged.source.spec!r} is a number for every weight, which no factors hold. Merge with "
                "--calibration-form low_rank (calibration_form)."
            )
        return {name: (_matrix(stored, f"{name}.up"), _matrix(stored, f"{name}.down")) for name in names}
    finally:
        stored.close()


def _matrix(checkpoint: Checkpoint, name: str) -> NDArray[np.floating]:
    info = checkpoint.tensors[name]
    return widen(checkpoint.read(name), info.dtype).reshape(info.shape)
