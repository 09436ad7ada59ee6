"""Read where the tensors of a GGUF file lie in it, under the names they have there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.gguf.header import FLOATS, read_gguf_header
from hf_frmerge.checkpoints.tensors.header import TensorInfo

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.local_folder import LocalFolder
    from hf_frmerge.checkpoints.remote_folder import RemoteFolder


def read_gguf(folder: LocalFolder | RemoteFolder, file: str, spec: str) -> tuple[list[TensorInfo], int]:
    """
    Find the tensors in a GGUF file; as `read_header` for a safetensors file, and of its arguments.

    Codes are bytes, of which the last index of a tensor runs over those of its row.

    Returns:
        `tuple[list[TensorInfo], int]`: Tensors in file order, and the size of the file in bytes.

    Raises:
        CheckpointError: If the gguf package is not installed, or the file is truncated or damaged.
    """
    tensors = read_gguf_header(folder, file, spec).tensors
    infos = [
        TensorInfo(
            each.name,
            FLOATS.get(each.type, "U8"),
            each.shape if each.type in FLOATS else (*each.shape[:-1], each.row_bytes),
            file,
            each.offset,
            each.nbytes,
        )
        for each in tensors
    ]
    return infos, folder.size(file)
