"""Give the embeddings and output layers of models with different vocabularies the same rows, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.names.model_names import read_names
from hf_frmerge.checkpoints.names.tokens import tensors_of_tokens
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo, some
from hf_frmerge.errors import CheckpointError


@dataclass(frozen=True)
class TokenTable:
    """
    Ids of the tokens in the output and in every model.

    Attributes:
        output: token -> id in the output.
        models: of every checkpoint, the base first if there is one: token -> id.
        holder: index of the checkpoint whose rows without a token the output keeps, so that it has no fewer rows.
        multiple: the number of rows is rounded up to a multiple of this.
    """

    output: Mapping[str, int]
    models: tuple[Mapping[str, int], ...]
    holder: int
    multiple: int = 1


@dataclass(frozen=True)
class TokenRows:
    """
    What became of the rows of tokens.

    Attributes:
        tensors: names of the tensors with a row for every token.
        n_rows: rows that they have in the output.
        stored: rows that they have in every checkpoint.
        filled: of every checkpoint, the number of tokens of the output that it lacks.
        unfilled: rows of the output that no checkpoint has.
    """

    tensors: tuple[str, ...]
    n_rows: int
    stored: tuple[int, ...]
    filled: tuple[int, ...]
    unfilled: int


def agree_on_tokens(checkpoints: Sequence[Checkpoint], table: TokenTable) -> TokenRows | None:
    """
    Map the rows of embeddings and output layers to the tokens of the output.

    The class of the first model is asked which tensors these are, only if vocabularies differ.

    Args:
        checkpoints (`Sequence[Checkpoint]`):
            Base model if there is one, then the full experts, with the same tensor names. Gives each `row_maps`.
        table (`TokenTable`):
            Tokens of the output and of the checkpoints.

    Returns:
        `TokenRows`, *optional*: None if all have the tokens of the output in its order, and as many rows.

    Raises:
        CheckpointError: If a checkpoint has fewer rows than tokens, or it is not known which of its tensors have rows
            for tokens.
    """
    reference = checkpoints[0]
    shapes = [{name: info.shape for name, info in each.tensors.items() if info.is_float} for each in checkpoints]
    is_common = all(shapes[0].get(name) == shape for each in shapes[1:] for name, shape in each.items())
    if is_common and table.multiple == 1 and all(model == table.output for model in table.models):
        return None
    axes = _axes(reference)
    stored = [_n_stored(each, axes) for each in checkpoints]
    for each, tokens, n_stored in zip(checkpoints, table.models, stored):
        _check_rows(each, tokens, n_stored)
    n_rows = max(max(table.output.values(), default=-1) + 1, stored[table.holder])
    n_rows = -(-n_rows // table.multiple) * table.multiple
    maps = [_row_map(table.output, tokens, n_rows, n) for tokens, n in zip(table.models, stored)]
    if all(len(rows) == n and np.array_equal(rows, np.arange(n)) for rows, n in zip(maps, stored)):
        return None
    for each, rows in zip(checkpoints, maps):
        each.row_maps |= {name: rows for name in axes if name in each.tensors}
    places = np.fromiter(table.output.values(), np.int64, len(table.output))
    filled = tuple(int(np.count_nonzero(rows[places] < 0)) for rows in maps)
    unfilled = int(np.count_nonzero(np.max(maps, axis=0) < 0))
    return TokenRows(tuple(axes), n_rows, tuple(stored), filled, unfilled)


def mapped_shape(checkpoint: Checkpoint, info: TensorInfo) -> tuple[int, ...]:
    """Return the shape that a tensor has when its rows are mapped."""
    rows = checkpoint.row_maps.get(info.name)
    if rows is None:
        return info.shape
    axis = next((axis for axis, length in enumerate(info.shape) if length > 1), 0)
    return (*info.shape[:axis], len(rows), *info.shape[axis + 1 :])


def _axes(reference: Checkpoint) -> dict[str, int]:
    """Return the stored names of the tensors with a row for every token, and the axis of the rows."""
    config, spec = reference.config(), reference.source.spec
    try:
        in_memory, known = tensors_of_tokens(config, spec)
    except CheckpointError as error:
        raise CheckpointError(
            f"The models have different vocabularies, and nothing tells which of their tensors have a row for every "
            f"token: {error}"
        ) from error
    names = read_names(config, spec)
    canonical = names.canonical(reference.tensors) if names else {name: name for name in reference.tensors}
    axes = {name: in_memory[own] for name, own in canonical.items() if own in in_memory}
    n_rows = {reference.tensors[name].shape[axis] for name, axis in axes.items()}
    unknown = [
        name
        for name, info in reference.tensors.items()
        if canonical[name] not in known and info.is_float and len(info.shape) > 1 and info.shape[0] in n_rows
    ]
    if not axes or unknown:
        raise CheckpointError(
            f"The models have different vocabularies, and {some(unknown) if unknown else 'no tensor'} of {spec!r} "
            f"{'may have' if unknown else 'has'} a row for every token, as far as its class in transformers tells. "
            "Give all models one tokenizer."
        )
    return axes


def _n_stored(checkpoint: Checkpoint, axes: Mapping[str, int]) -> int:
    sizes = {
        name: checkpoint.tensors[name].shape[axis]
        for name, axis in axes.items()
        if name in checkpoint.tensors and len(checkpoint.tensors[name].shape) > axis
    }
    if len(set(sizes.values())) != 1:
        listed = some(f"{name} has {size}" for name, size in sizes.items())
        raise CheckpointError(
            f"{checkpoint.source.spec!r} has different numbers of rows for its tokens ({listed or 'none'}). Load it "
            "with transformers, call `model.resize_token_embeddings(len(tokenizer))` and save it again."
        )
    return next(iter(sizes.values()))


def _check_rows(checkpoint: Checkpoint, tokens: Mapping[str, int], n_stored: int) -> None:
    without = [token for token, place in tokens.items() if place >= n_stored]
    if without:
        raise CheckpointError(
            f"{checkpoint.source.spec!r} has {n_stored} rows of embeddings, fewer than its tokenizer needs: "
            f"{some(map(repr, without))} have none. Resize them once, which gives these tokens rows:\n"
            "    from transformers import AutoModelForCausalLM, AutoTokenizer  # or the class of the model\n"
            f'    model = AutoModelForCausalLM.from_pretrained("{checkpoint.source.spec}")\n'
            f'    tokenizer = AutoTokenizer.from_pretrained("{checkpoint.source.spec}")\n'
            "    model.resize_token_embeddings(len(tokenizer))\n"
            '    model.save_pretrained("resized")\n'
            '    tokenizer.save_pretrained("resized")'
        )


def _row_map(output: Mapping[str, int], own: Mapping[str, int], n_rows: int, n_stored: int) -> NDArray[np.int64]:
    """Return the stored row of every row of the output; -1 where the model has none."""
    rows = np.arange(n_rows)
    # A row without a token stays where it is, unless the model has a token there that belongs elsewhere.
    rows[n_stored:] = -1
    taken = np.fromiter(own.values(), np.int64, len(own))
    rows[taken[taken < n_rows]] = -1
    for token, place in output.items():
        rows[place] = own.get(token, -1)
    return rows
