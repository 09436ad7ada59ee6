from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_frmerge.hub.card.tasks import Task, read_task, task_of_config


@pytest.mark.parametrize(
    ("config_class", "model_class", "pipeline_tag"),
    [
        ("LlamaConfig", "LlamaForCausalLM", "text-generation"),
        ("GPT2Config", "GPT2LMHeadModel", "text-generation"),
        ("BertConfig", "BertForMaskedLM", "fill-mask"),
        ("BertConfig", "BertForSequenceClassification", "text-classification"),
        ("BertConfig", "BertForTokenClassification", "token-classification"),
        ("BertConfig", "BertForQuestionAnswering", "question-answering"),
        ("BertConfig", "BertModel", "feature-extraction"),
        ("ViTConfig", "ViTModel", "image-feature-extraction"),
        ("ViTConfig", "ViTForImageClassification", "image-classification"),
        ("T5Config", "T5ForConditionalGeneration", "text-generation"),
        ("WhisperConfig", "WhisperForConditionalGeneration", "automatic-speech-recognition"),
        ("LlavaConfig", "LlavaForConditionalGeneration", "image-text-to-text"),
    ],
)
def test_the_auto_class_named_is_the_one_transformers_would_load_with(config_class, model_class, pipeline_tag):
    import transformers

    config = getattr(transformers, config_class)(architectures=[model_class])
    task = task_of_config(json.loads(config.to_json_string(use_diff=False)))
    assert task.pipeline_tag == pipeline_tag
    loader = getattr(transformers, task.auto_class)
    assert loader._model_mapping[type(config)].__name__ == model_class


def test_what_the_name_does_not_tell_is_left_to_the_hub():
    assert task_of_config({}).pipeline_tag is None
    assert task_of_config({"architectures": ["MysteryForSomething"]}).pipeline_tag is None
    assert task_of_config({"architectures": ["OddForConditionalGeneration"]}).pipeline_tag is None


def test_encoder_decoders_carry_the_tag_people_filter_by():
    task = task_of_config(
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True, "vocab_size": 9}
    )
    assert task.tags == ("text2text-generation",)


def test_adapter_folder(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"task_type": "SEQ_CLS"}))
    assert read_task(tmp_path) == Task("text-classification", "AutoModelForSequenceClassification", "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"task_type": None}))
    assert read_task(tmp_path) == Task(None, "AutoModel", "peft")


def test_sentence_model_folder(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert read_task(tmp_path).pipeline_tag == "feature-extraction"
    (tmp_path / "modules.json").write_text("[]")
    assert read_task(tmp_path).library_name == "sentence-transformers"
    assert read_task(tmp_path).pipeline_tag == "sentence-similarity"
