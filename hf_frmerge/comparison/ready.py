"""Merges that are there already, whatever made them, among those that a comparison makes."""

from __future__ import annotations

from collections.abc import Sequence

from hf_frmerge.checkpoints.resolve import resolve_all
from hf_frmerge.checkpoints.source import refuse_gguf
from hf_frmerge.comparison.candidates import Candidate, Cell
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.models.identity import model_identity
from hf_frmerge.evaluation.models.merged import architecture_of
from hf_frmerge.evaluation.models.names import models_of_merge


def ready_cells(
    models: Sequence[str], architecture: str, *, token: str | bool | None = None, allow_pickle: bool = False
) -> list[Cell]:
    """
    Return a cell for every merge that is there already: a full model or an adapter, in a folder or on the Hub.

    It is known by its content, so that a model that was written anew is measured anew.

    Args:
        models: Folders or Hub ids.
        architecture: Class of the models that are compared.
        token, allow_pickle: As for `resolve`.

    Raises:
        ArgumentError: If one is of another architecture, and so not a merge of these experts.
        CheckpointError: If one is missing or broken.
    """
    sources = dict(zip(models, resolve_all(models, token=token, allow_pickle=allow_pickle)))
    refuse_gguf(sources.values())
    cells = []
    for name, spec in models_of_merge(models)[0].items():
        source = sources[spec]
        found = architecture_of(source.path) if source.kind != "adapter" else architecture
        if found != architecture:
            raise ArgumentError(
                f"{spec} is {found or 'a model without a name of its class'}, and the experts are {architecture}: it "
                "is no merge of them. Leave it out (--also, also)."
            )
        content = (("content", model_identity(source)),)
        cells.append(Cell(Candidate(name, content), scale=None, weights=None, model=spec))
    return cells
