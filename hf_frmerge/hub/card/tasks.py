"""Task, library and loading class of a merged model, for the front matter of its card.

They follow from the architecture name in the configuration by the naming convention of transformers' classes; a table
of architectures would always be out of date. If the convention does not decide, no task is set: the Hub infers one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.tensors.small_files import read_config, read_json


@dataclass(frozen=True)
class Task:
    """Task, library and loading class of a model, in the vocabulary of the Hub and of transformers."""

    pipeline_tag: str | None = None
    auto_class: str = "AutoModel"
    library_name: str = "transformers"
    tags: tuple[str, ...] = ()


# Ending of the class name -> (pipeline tag, auto class). Longer endings first where one contains another.
_BY_ENDING: tuple[tuple[str, str, str], ...] = (
    ("ForCausalLM", "text-generation", "AutoModelForCausalLM"),
    ("LMHeadModel", "text-generation", "AutoModelForCausalLM"),
    ("ForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
    ("ForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "question-answering", "AutoModelForQuestionAnswering"),
    ("ForMultipleChoice", "multiple-choice", "AutoModelForMultipleChoice"),
    ("ForImageClassification", "image-classification", "AutoModelForImageClassification"),
    ("ForVideoClassification", "video-classification", "AutoModelForVideoClassification"),
    ("ForSemanticSegmentation", "image-segmentation", "AutoModelForSemanticSegmentation"),
    ("ForObjectDetection", "object-detection", "AutoModelForObjectDetection"),
    ("ForDepthEstimation", "depth-estimation", "AutoModelForDepthEstimation"),
    ("ForAudioClassification", "audio-classification", "AutoModelForAudioClassification"),
    ("ForCTC", "automatic-speech-recognition", "AutoModelForCTC"),
    ("ForSpeechSeq2Seq", "automatic-speech-recognition", "AutoModelForSpeechSeq2Seq"),
)

# `text2text-generation` is no longer a task on the Hub (it became a kind of text generation in 2025) but is still
# the tag by which people filter for encoder-decoders.
_TEXT_TO_TEXT = Task("text-generation", "AutoModelForSeq2SeqLM", tags=("text2text-generation",))

_BY_ADAPTER_TASK: dict[str, Task] = {
    "CAUSAL_LM": Task("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": _TEXT_TO_TEXT,
    "SEQ_CLS": Task("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": Task("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": Task("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": Task("feature-extraction", "AutoModel"),
}


def task_of_config(config: Mapping[str, Any]) -> Task:
    """
    Determine the task of a full model from the contents of its `config.json`.

    Args:
        config (`Mapping[str, Any]`):
            Parsed `config.json`; `architectures` decides.

    Returns:
        `Task`: With `pipeline_tag=None` if the class name does not decide.
    """
    architectures = config.get("architectures") or []
    if not architectures:
        return Task()
    architecture = str(architectures[0])
    for ending, pipeline_tag, auto_class in _BY_ENDING:
        if architecture.endswith(ending):
            return Task(pipeline_tag, auto_class)
    if architecture.endswith("ForConditionalGeneration"):
        return _task_of_conditional_generation(config)
    if architecture.endswith("Model"):  # a model without a head returns features
        is_vision = "image_size" in config or "patch_size" in config
        return Task("image-feature-extraction" if is_vision else "feature-extraction")
    return Task()


def _task_of_conditional_generation(config: Mapping[str, Any]) -> Task:
    """Tell translators, vision-language and speech models, all `ForConditionalGeneration`, apart by their config."""
    if "vision_config" in config:
        return Task("image-text-to-text", "AutoModelForImageTextToText")
    if "audio_config" in config:
        return Task("audio-text-to-text")
    if "num_mel_bins" in config:
        return Task("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq")
    if config.get("is_encoder_decoder") and "vocab_size" in config:
        return _TEXT_TO_TEXT
    return Task()


def read_task(folder: Path | str) -> Task:
    """
    Determine the task of the model or adapter in a local folder.

    Args:
        folder (`Path` or `str`):
            Folder with `config.json` or `adapter_config.json`; `modules.json` marks a sentence-transformers model.

    Returns:
        `Task`: For an adapter, the task in its own config, with the library `peft`.
    """
    folder = Path(folder)
    adapter_config = folder / "adapter_config.json"
    if adapter_config.is_file():
        task_type = read_json(LocalFolder(str(folder)), adapter_config.name, str(folder)).get("task_type")
        task = _BY_ADAPTER_TASK.get(str(task_type), Task())
        return Task(task.pipeline_tag, task.auto_class, "peft", task.tags)
    if (folder / "modules.json").is_file():
        return Task("sentence-similarity", "SentenceTransformer", "sentence-transformers", ("feature-extraction",))
    return task_of_config(read_config(LocalFolder(str(folder)), str(folder)))
