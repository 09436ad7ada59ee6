"""The one merged model of a comparison, made again and again in the same memory."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from hf_frmerge.checkpoints.beside.donor import write_config
from hf_frmerge.comparison.shared_rules import SharedGrams, SharedMatrices
from hf_frmerge.evaluation.models.loading import model_class_of
from hf_frmerge.evaluation.models.merged import architecture_of
from hf_frmerge.merging.outputs.memory_output import MemoryOutput
from hf_frmerge.merging.run import merge_into_memory
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hf_frmerge.comparison.candidates import Cell
    from hf_frmerge.merging.engine.rules import Rule
    from hf_frmerge.merging.planning.plan import MergePlan

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MergedModel:
    """
    A merged model in memory: the tensors that a merge writes, and the model that is loaded from what it writes.

    Gram matrices are measured once for all span methods of one space and one kind of blocks. What a spectral method
    makes of the matrices is kept in files while its scales are tried.

    Args:
        plan: Plan of any merge of these experts into a full model.
        dtype: Dtype of the model, as for `from_pretrained`.
        scratch: Empty folder for the configuration and for merged matrices.

    Attributes:
        folder: folder with the configuration that the merge would write.
    """

    def __init__(self, plan: MergePlan, dtype: str, scratch: Path) -> None:
        self._output = MemoryOutput(plan)
        self.folder, self._dtype, self._scratch = str(scratch), dtype, scratch
        self._dtypes_and_shapes = {step.name: (_DTYPES[step.dtype], step.shape) for step in plan.steps}
        write_config(plan.donor.source, scratch, dtype=plan.args.dtype, changes=plan.config_changes)
        self._grams: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
        self._matrices: tuple[str, Path] | None = None
        self._model: Any = None

    @property
    def architecture(self) -> str:
        """Name of its class."""
        return architecture_of(self.folder)

    def merge(self, plan: MergePlan, cell: Cell) -> None:
        """Merge. The tensors of the merge before are replaced."""
        merge_into_memory(plan, self._output, self._rule(plan, cell))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the merged tensors by their names in a file; they share the memory."""
        return {
            name: torch.from_numpy(data)
            .view(self._dtypes_and_shapes[name][0])
            .reshape(self._dtypes_and_shapes[name][1])
            for name, data in self._output.tensors.items()
        }

    def model(self) -> Any:
        """Return the model that `from_pretrained` would load if the merge were written; valid until the next merge."""
        if not self._shares_memory():
            self._model = None
            gc.collect()  # before loading: models hold reference cycles, and two may not fit
            config = AutoConfig.from_pretrained(self.folder)
            self._model = model_class_of(self.folder).from_pretrained(
                None, config=config, state_dict=self.tensors(), dtype=self._dtype
            )
        return self._model

    def _shares_memory(self) -> bool:
        """Whether the model that was loaded before has the merged tensors themselves, and no copies of them."""
        if self._model is None:
            return False
        places = {tensor.data_ptr() for tensor in self.tensors().values()}
        return all(tensor.data_ptr() in places for tensor in self._model.state_dict().values())

    def _rule(self, plan: MergePlan, cell: Cell) -> Rule | None:
        kind = METHODS[plan.args.method].kind
        if kind == "span" and plan.fitted is None:
            return SharedGrams(plan, self._grams.setdefault((plan.space, plan.args.block), {}))
        if kind == "spectral":
            return SharedMatrices(plan, self._matrices_of(cell))
        return None

    def _matrices_of(self, cell: Cell) -> Path:
        """Return the folder for the matrices of a cell whatever its scale; those of another method are removed."""
        key = f"{cell.candidate.label} {cell.weights}"
        if self._matrices is None or self._matrices[0] != key:
            folder = self._scratch / "matrices"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            self._matrices = key, folder
        return self._matrices[1]
