"""Compare the embeddings of models that make them (sentence-transformers)."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from hf_frmerge.checkpoints.beside.sentence_transformers import Pipeline, check_same_embeddings, read_pipeline
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.evaluation.measures.embeddings import EmbeddingSteps, embed, embedding_steps, mean_cosine
from hf_frmerge.evaluation.models.loading import ModelLoader
from hf_frmerge.evaluation.record import EMBEDDING_COSINE, MERGED, Score
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.text.token_blocks import Rows

logger = logging.getLogger(__name__)


def steps_of_models(sources: Mapping[str, Source]) -> EmbeddingSteps | None:
    """
    Return how the models make embeddings; `None` if none of them says how, or it is not measured, with a warning.

    The prompt and the longest input are those of the merged model, else of the first model that has any.

    Raises:
        CheckpointError: If they pool differently.
    """
    found = {name: read_pipeline(source) for name, source in sources.items()}
    pipelines: dict[str, Pipeline] = {name: pipeline for name, pipeline in found.items() if pipeline is not None}
    if not pipelines:
        return None
    check_same_embeddings(list(pipelines.values()))
    steps = embedding_steps(pipelines.get(MERGED) or next(iter(pipelines.values())))
    if isinstance(steps, EmbeddingSteps):
        return steps
    logger.warning("The embeddings of these models are not compared: %s.", steps)
    return None


def embedding_scores(
    models: ModelSet,
    sources: Mapping[str, Source],
    base: Source | None,
    domains: Mapping[str, Rows],
    steps: EmbeddingSteps,
    options: SuiteOptions,
    run: RunSettings,
) -> list[Score]:
    """
    Return the mean cosine of every model's embeddings to those of every expert; none if there is nothing to compare.

    Every model is loaded once more and embeds all texts, on every process; nothing is cached on disk.

    Args:
        models (`ModelSet`): The models, with the tokenizer.
        sources (`Mapping[str, Source]`): Those that are not in memory.
        base (`Source`, *optional*): Base of adapters.
        domains (`Mapping[str, Rows]`): Name -> texts, which can be read again.
        steps (`EmbeddingSteps`): How embeddings are made.
        options, run: As for `evaluate_suite`.
    """
    experts = [name for name, role in models.roles.items() if role == "expert"]
    if len(models.specs) < 2 or not experts:
        return []
    loader = ModelLoader(base, options.dtype, options.device_map)
    embeddings: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, spec in models.specs.items():
        if run.on_model is not None:
            run.on_model(name)
        model = spec if isinstance(spec, torch.nn.Module) else loader.load(sources[name])
        embeddings[name] = {
            domain: embed(
                model,
                rows,
                models.processing_class,
                steps,
                batch_size=options.batch_size,
                device=run.accelerator.device,
            )
            for domain, rows in domains.items()
        }
        if not isinstance(spec, torch.nn.Module):
            loader.release(model)
        del model  # before the next is loaded, so that only one is in memory
    return [
        Score(
            name,
            domain,
            {
                f"{EMBEDDING_COSINE}{expert}": mean_cosine(vectors, embeddings[expert][domain])
                for expert in experts
                if expert != name
            },
            n_samples=len(vectors),
        )
        for name, of_model in embeddings.items()
        for domain, vectors in of_model.items()
    ]
