"""What the models of a comparison read, and what prepares it for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_frmerge.checkpoints.source import Source
from hf_frmerge.comparison.texts import Reads
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.measures.classification import is_classifier, is_image_classifier
from hf_frmerge.evaluation.models.loading import model_class_of
from hf_frmerge.evaluation.models.merged import whole_model
from hf_frmerge.evaluation.suite.inputs import find_tokenizer
from hf_frmerge.evaluation.suite.merge_evaluation import common_image_processor
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments


def what_models_read(architecture: str, folder: str) -> Reads:
    """
    Return what models of a class read.

    Args:
        architecture: Name of the class.
        folder: Folder with their configuration.

    Raises:
        ArgumentError: If nothing that they predict tells one merge from another.
    """
    if is_classifier(architecture):
        return "labelled text"
    if is_image_classifier(architecture):
        return "images"
    if model_class_of(folder).can_generate():
        return "text"
    raise ArgumentError(
        f"The experts are {architecture}, which predicts neither a next token nor a label, so no method can be told "
        "from another by it. Compare experts with a head: causal language models, or classifiers of text or images. "
        "How near a merge of embedding models (sentence-transformers) is to each of them, `frmerge evaluate` says."
    )


def find_processing_class(
    reads: Reads, sources: Sequence[Source], base_model: str | None, args: MergingArguments
) -> Any:
    """
    Return the tokenizer of the first model that has one, or the image processor of all; `None` if there is none.

    Raises:
        ArgumentError: If the models prepare images differently.
    """
    if reads != "images":
        return find_tokenizer(sources)
    return common_image_processor(
        {source.spec: whole_model(source.path, base_model, args.hub_token, args.allow_pickle) for source in sources}
    )
