"""lm-evaluation-harness on a task file with data of its own, really run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import save_llama_family
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.evaluation.bridges.harness import run_lm_eval

WORDS = ["the", "house", "of", "wisdom", "has", "many", "rooms", "and", "each", "opens"]
DOCUMENTS = [
    {"question": "the house of", "choices": ["wisdom", "rooms", "and"], "answer": 0},
    {"question": "each of the", "choices": ["has", "many", "house"], "answer": 2},
    {"question": "many rooms and", "choices": ["opens", "wisdom", "each"], "answer": 1},
]
TASK = """
task: proverbs
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_llama_family(root, WORDS, 0.3)
    for name in ("base", "math"):  # the harness wants a token to begin with
        tokenizer = AutoTokenizer.from_pretrained(root / name)
        tokenizer.eos_token = "<unk>"
        tokenizer.save_pretrained(root / name)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(root / "adapter")
    return root


@pytest.fixture
def task(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "my tasks"
    folder.mkdir()
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (folder / "proverbs.yaml").write_text(TASK.format(data=data))
    return folder / "proverbs.yaml"


def naive_accuracy(folder: Path) -> float:
    """The choice of highest log-likelihood after the question, by a plain forward pass."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for document in DOCUMENTS:
        prompt = tokenizer(document["question"], return_tensors="pt").input_ids
        with torch.no_grad():
            log_probs = model(prompt).logits[0, -1].float().log_softmax(-1)
        scores = [log_probs[tokenizer(choice).input_ids[0]].item() for choice in document["choices"]]
        right += scores.index(max(scores)) == document["answer"]
    return right / len(DOCUMENTS)


def test_a_local_task_runs_and_the_command_is_recorded(models: Path, task: Path) -> None:
    record = run_lm_eval(str(models / "math"), [str(task)], batch_size=2, device="cpu")
    [score] = record.scores
    assert (score.model, score.domain, score.n_samples) == ("merged", "proverbs", len(DOCUMENTS))
    assert score.metrics == {"acc": pytest.approx(naive_accuracy(models / "math"))}
    assert record.commands == [
        "lm_eval --model hf --model_args pretrained=./math,dtype=auto --tasks proverbs --batch_size 2 "
        "--include_path './my tasks'"
    ]


def test_an_adapter_runs_on_its_base(models: Path, task: Path) -> None:
    record = run_lm_eval(str(models / "adapter"), [str(task)], base_model=str(models / "base"), device="cpu")
    assert record.scores[0].n_samples == len(DOCUMENTS)
    assert "pretrained=./base,peft=./adapter" in record.commands[0]


def test_tasks_that_are_not_there_are_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"none\.yaml' does not exist"):
        run_lm_eval(str(models / "math"), [str(tmp_path / "none.yaml")])
    (tmp_path / "bad.yaml").write_text("dataset_path: json\nprocess_docs: !function utils.process\n")
    with pytest.raises(ArgumentError, match=r"bad\.yaml' has no line `task: NAME`"):
        run_lm_eval(str(models / "math"), [str(tmp_path / "bad.yaml")])


def test_without_the_harness_it_says_how_to_install_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MergeError, match=r'pip install "hf_frmerge\[lm-eval\]"'):
        run_lm_eval(str(models / "math"), ["hellaswag"])


@pytest.mark.slow
def test_the_harness_knows_the_tasks_of_the_paper(models: Path) -> None:
    """Only the name that no task has is refused, before anything of the others is fetched."""
    pytest.importorskip("lm_eval")
    tasks = ["hellaswag", "BBH", "mmlu-pro", "musr", "gpqa_diamond", "helloswag"]
    with pytest.raises(ArgumentError, match=r"no task 'helloswag'.*hellaswag, bbh, mmlu-pro, musr, gpqa-diamond"):
        run_lm_eval(str(models / "math"), tasks)
