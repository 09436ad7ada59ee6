"""Cut tensors into blocks, each of which is merged by itself, and blocks into pieces of fixed size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.planning.tensor_step import TensorStep

PIECE_ELEMENTS = 1 << 20
"""Elements of a piece. A constant, because partial sums and so the last bits of a Gram matrix depend on it."""

# Names in transformers of the attention projections whose rows belong to heads.
_HEAD_ROWS = re.compile(
    r"(^|\.)(q|k|v|query|key|value|q_proj|k_proj|v_proj|q_lin|k_lin|v_lin|qkv|qkv_proj|query_key_value|Wqkv)"
    r"\.(weight|bias)$"
)


@dataclass(frozen=True)
class Piece:
    """
    Run of elements that is processed at once: several whole blocks, or a part of one block.

    Pieces follow from the shape alone, never from the memory budget or the threads, because partial sums of a Gram
    matrix depend on where it is cut. That makes the bits of a merge independent of both.
    """

    start: int
    stop: int
    first_block: int
    n_blocks: int

    @property
    def block_len(self) -> int:
        """Number of elements of each block in this piece."""
        return (self.stop - self.start) // self.n_blocks


def block_shape(name: str, shape: tuple[int, ...], block: str, head_dim: int | None) -> tuple[int, int]:
    """
    Return how many blocks a tensor has and how many elements each.

    `"row"` cuts matrices (and stacks of matrices) along their first dimension; vectors stay whole. `"head"` cuts
    query, key and value projections into runs of `head_dim` rows; all other tensors stay whole. Every other block
    size covers at least the tensor.
    """
    numel = math.prod(shape)
    if block == "row" and len(shape) > 1 and numel:
        return shape[0], numel // shape[0]
    if block == "head" and head_dim and _HEAD_ROWS.search(name) and shape[0] % head_dim == 0:
        return shape[0] // head_dim, numel // (shape[0] // head_dim)
    return 1, numel


def head_dim_of(config: dict[str, Any]) -> int:
    """
    Return the width of an attention head from a model's config.

    Raises:
        ArgumentError: If the config does not say.
    """
    # Vision-language models keep the settings of the language model in `text_config`.
    inner = config.get("text_config")
    config = {**config, **(inner if isinstance(inner, dict) else {})}
    numbers = {key: value for key, value in config.items() if type(value) is int and value > 0}
    for key in ("head_dim", "d_kv"):
        if key in numbers:
            return numbers[key]
    for width, heads in (
        ("hidden_size", "num_attention_heads"),
        ("n_embd", "n_head"),
        ("dim", "n_heads"),
        ("d_model", "encoder_attention_heads"),
    ):
        if numbers.get(width, 0) >= numbers.get(heads, math.inf):
            return numbers[width] // numbers[heads]
    raise ArgumentError(
        'block="head" needs the width of an attention head, and config.json names neither head_dim nor the hidden '
        'size and the number of heads. Use block="row" or block="tensor".'
    )


def group_of(name: str, block: str) -> str:
    """Return the group of a tensor: the tensors of one group are one point and get the same coefficients."""
    if block == "model":
        return ""
    if block == "layer":
        layer = re.match(r"(.*?\.\d+)(\.|$)", name)
        return layer.group(1) if layer else name
    return name


def pieces(n_blocks: int, block_len: int) -> Iterator[Piece]:
    """Cut a tensor of `n_blocks` blocks into pieces of at most `PIECE_ELEMENTS` elements, or one block if smaller."""
    if not block_len:
        return
    if block_len <= PIECE_ELEMENTS:
        step = PIECE_ELEMENTS // block_len
        for first in range(0, n_blocks, step):
            count = min(step, n_blocks - first)
            yield Piece(first * block_len, (first + count) * block_len, first, count)
        return
    for block in range(n_blocks):
        for start in range(0, block_len, PIECE_ELEMENTS):
            stop = min(start + PIECE_ELEMENTS, block_len)
            yield Piece(block * block_len + start, block * block_len + stop, block, 1)


def pieces_of(step: TensorStep) -> list[Piece]:
    """Cut the tensor of a step; a matrix that is merged as one is one piece."""
    if step.is_matrix:
        return [Piece(0, step.numel, 0, step.n_blocks)]
    return list(pieces(step.n_blocks, step.block_len))
