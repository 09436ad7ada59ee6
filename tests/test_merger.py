"""`FisherRaoMerger` end to end, on a tiny real language model with a real tokenizer."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from hub_server import ALICE_TOKEN, HubServer
from huggingface_hub import ModelCard
from merge_reference import write_family
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import save_llama_family
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_frmerge import (
    CollapseGuardCallback,
    FisherRaoMerger,
    MergeCallback,
    MergingArguments,
    PrinterCallback,
    ProgressCallback,
)
from hf_frmerge.errors import ArgumentError, HubError, MergeError
from hf_frmerge.evaluation.record import load_record
from hf_frmerge.methods.method import Paper
from hf_frmerge.provenance.verify import verify

WORDS = ["the", "house", "of", "wisdom", "has", "many", "rooms", "and", "each", "room", "opens", "on", "another"]
TEXTS = {"proverb": [" ".join(WORDS * 6)], "reverse": [" ".join(WORDS[::-1] * 6)]}
EVENTS = [name for name in vars(MergeCallback) if name.startswith("on_")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `base`, `math` and `code`: bfloat16, tied, 20 tensors; the experts at wide angles in delta space."""
    root = tmp_path_factory.mktemp("models")
    save_llama_family(root, WORDS, 0.05)
    return root


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known from another test."""
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(models: Path, tmp_path: Path) -> Any:
    """Make a merger of the two experts into `tmp_path/merged`."""

    def build(*, callbacks: Any = None, **options: Any) -> FisherRaoMerger:
        own = {"eval_dataset", "compute_metrics", "preprocess_logits_for_metrics", "weights", "base_model", "experts"}
        given = {name: options.pop(name) for name in own & options.keys()}
        experts = given.pop("experts", [str(models / "math"), str(models / "code")])
        args = {"output_dir": str(tmp_path / "merged"), "disable_tqdm": True, "use_cpu": True} | options
        return FisherRaoMerger(experts, MergingArguments(**args), callbacks=callbacks, **given)

    return build


def n_tensors(models: Path) -> int:
    return len(load_file(models / "math" / "model.safetensors"))


class Recorder(MergeCallback):
    """Writes down every event and what came with it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.seen: list[dict[str, Any]] = []


def _recording(event: str) -> Any:
    def record(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(event)
        self.seen.append({"step": state.global_step, **kwargs})

    return record


for _event in EVENTS:
    setattr(Recorder, _event, _recording(_event))


def test_events_of_a_merge_its_evaluation_and_its_push(make: Any, models: Path, hub: HubServer) -> None:
    recorder = Recorder()
    n = n_tensors(models)
    merger = make(callbacks=[recorder], eval_dataset=TEXTS["proverb"], logging_steps=8, logging_first_step=True)
    assert merger.merge() is merger
    merger.evaluate()
    merger.push_to_hub("alice/merged", token=ALICE_TOKEN)

    due = [1, *range(8, n + 1, 8)]
    steps = [e for i in range(1, n + 1) for e in (["on_step_end", "on_log"] if i in due else ["on_step_end"])]
    # Several tensors are under way at once, so begins run ahead of ends.
    assert [event for event in recorder.events if event != "on_step_begin"] == [
        "on_init_end", "on_merge_begin", *steps, "on_save", "on_log", "on_merge_end",
        *["on_prediction_step"] * 3, "on_log", "on_evaluate", "on_push_begin",  # one batch for each of three models
    ]  # fmt: skip
    assert recorder.events.count("on_step_begin") == n
    begun = 0
    for index, event in enumerate(recorder.events):  # no tensor ends that has not begun
        begun += event == "on_step_begin"
        assert recorder.events[: index + 1].count("on_step_end") <= begun
    results = [seen["result"].name for seen in recorder.seen if "result" in seen]
    assert results == list(load_file(models / "math" / "model.safetensors"))
    by_event = dict(zip(recorder.events, recorder.seen, strict=True))
    assert by_event["on_evaluate"]["model"] is None, "models were loaded and freed in turn"
    assert by_event["on_evaluate"]["is_last"] is True
    assert by_event["on_evaluate"]["places"]["eval_effective_rank"].startswith("layer ")
    assert by_event["on_prediction_step"]["eval_dataloader"] is not None
    assert by_event["on_log"]["logs"].keys() == by_event["on_evaluate"]["metrics"].keys()


def test_state_report_and_log_history_count_what_happened(make: Any, models: Path) -> None:
    n = n_tensors(models)
    merger = make(logging_steps=5).merge()
    state, report = merger.state, merger.report
    nbytes = sum(t.numel() * t.element_size() for t in load_file(models / "math" / "model.safetensors").values())
    assert (state.global_step, state.max_steps, state.epoch) == (n, n, 1.0)
    assert (state.bytes_done, state.bytes_total, report["output_bytes"]) == (nbytes, nbytes, nbytes)
    assert (report["complete"], report["n_merged"], report["n_copied"], report["n_skipped"]) == (True, n, 0, 0)
    assert report["input_bytes"] == 2 * nbytes
    assert [source["weight"] for source in state.sources] == [0.5, 0.5]
    assert [entry["step"] for entry in state.log_history] == [*range(5, n + 1, 5), n]
    assert set(state.log_history[0]) == {"norm_ratio", "max_angle", "n_iter", "step"}
    assert state.log_history[-1]["merge_n_merged"] == n
    assert state.worst_residual == report["residual"] < 1e-12
    merger.args.overwrite = True
    merger.merge()  # counts start again
    assert (state.global_step, state.bytes_done) == (n, nbytes)


def test_the_merged_model_loads_and_is_the_mean(make: Any, models: Path, tmp_path: Path) -> None:
    merger = make(method="linear", weights=[3, 1]).merge()
    experts = [load_file(models / name / "model.safetensors") for name in ("math", "code")]
    for name, tensor in merger.model.state_dict().items():
        if name != "lm_head.weight":
            expected = 0.75 * experts[0][name].double() + 0.25 * experts[1][name].double()
            assert torch.equal(tensor, expected.bfloat16())
    assert isinstance(merger.model, LlamaForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("wisdom of the house").input_ids == [4, 3, 1, 2]


def test_callbacks_are_added_popped_and_removed(make: Any) -> None:
    recorder = Recorder()
    merger = make(callbacks=[recorder])
    assert merger.pop_callback(PrinterCallback) is not None
    merger.add_callback(ProgressCallback)
    merger.remove_callback(ProgressCallback)
    assert merger.pop_callback(recorder) is recorder
    assert merger.pop_callback(recorder) is None
    merger.merge()
    assert recorder.events == ["on_init_end"]
    assert [type(c).__name__ for c in merger.callback_handler.callbacks] == ["DefaultFlowCallback"]


class SkipEmbeddings(MergeCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_skip_tensor = state.current_tensor == "model.embed_tokens.weight"


def test_a_callback_may_keep_a_tensor_of_the_base(make: Any, models: Path, tmp_path: Path) -> None:
    merger = make(callbacks=[SkipEmbeddings], base_model=str(models / "base")).merge()
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", models / "base"))
    equal = {name for name in merged if torch.equal(merged[name], base[name])}
    assert equal == {"model.embed_tokens.weight"}
    assert merger.report["n_skipped"] == 1
    assert verify(str(tmp_path / "merged")).ok


class StopAfter(MergeCallback):
    def __init__(self, n: int) -> None:
        self.n = n

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.n:
            control.should_merge_stop, control.stop_reason = True, "the kettle boils"


def test_a_stopped_merge_leaves_no_model_and_resumes(make: Any, models: Path, tmp_path: Path) -> None:
    recorder, out, n = Recorder(), tmp_path / "merged", n_tensors(models)
    merger = make(callbacks=[StopAfter(4), recorder], num_workers=1)
    with pytest.raises(
        MergeError, match=rf"stopped after \d+ of {n} tensors: the kettle boils.*resume_from"
    ) as caught:
        merger.merge()
    assert f"after {merger.state.global_step} of" in str(caught.value)
    assert recorder.events[-1] == "on_merge_end"
    assert not merger.is_merged
    assert not [path.name for path in out.iterdir() if not path.name.startswith(".")]
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(out)
    for call in (merger.create_model_card, merger.save_model, merger.push_to_hub, lambda: merger.model):
        with pytest.raises(RuntimeError, match=r"call `merge\(\)` first"):
            call()

    merger.remove_callback(StopAfter)
    arguments, before = merger.args, merger.args.to_dict()
    merger.merge(resume_from_checkpoint=True)
    assert merger.args is arguments and arguments.to_dict() == before, "of this merge alone, as with Trainer"
    assert before["resume_from_checkpoint"] is False
    assert (merger.state.global_step, merger.state.epoch) == (n, 1.0)
    fresh = make(output_dir=str(tmp_path / "fresh")).merge()
    assert fresh.report["n_merged"] == n
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "fresh" / "model.safetensors").read_bytes()


def test_a_subclass_says_on_the_card_what_it_is(models: Path, tmp_path: Path) -> None:
    class Soup(FisherRaoMerger):
        _tag_names = ("soup",)
        _name = "Souping"
        _paper = Paper("Model soups: averaging weights", "Mitchell Wortsman, Ludwig Schmidt", 2022, "2203.05482")
        _template_file = str(tmp_path / "soup.jinja")

    (tmp_path / "soup.jinja").write_text("{{ card.tool_name }} of {{ card.experts | length }}: {{ papers | last }}\n")
    args = MergingArguments(output_dir=str(tmp_path / "out"), disable_tqdm=True)
    Soup([str(models / name) for name in ("math", "code")], args).merge()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["soup", "karcher-mean", "fisher-rao"]
    assert card.text.strip() == (
        "Souping of 2: @article{wortsman2022model,\n"
        "  title         = {Model soups: averaging weights},\n"
        "  author        = {Wortsman, Mitchell and Schmidt, Ludwig},\n"
        "  year          = {2022},\n"
        "  eprint        = {2203.05482},\n"
        "  archivePrefix = {arXiv}\n}"
    )


def test_a_collapse_guard_stops_a_merge_that_loses_its_norm(make: Any, models: Path, tmp_path: Path) -> None:
    # The plain mean of two independent deltas keeps about 1/sqrt(2) of their norm.
    guard = CollapseGuardCallback(min_norm_ratio=0.9)
    options = {"base_model": str(models / "base"), "space": "deltas"}
    with pytest.raises(MergeError, match=r"collapse guard: \S+: norm_ratio is 0\.\d+ \(guard: norm_ratio<0.9\)"):
        make(callbacks=[guard], method="linear", **options).merge()
    assert not (tmp_path / "merged" / "config.json").exists()
    assert make(callbacks=[guard], method="karcher", overwrite=True, **options).merge().is_merged
    assert guard.trips == []


def reference_loss(folder: Path, text: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits.float()
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


def test_evaluation_of_one_dataset(make: Any, models: Path, tmp_path: Path) -> None:
    merger = make(eval_dataset=TEXTS["proverb"]).merge()
    metrics = merger.evaluate()
    loss = reference_loss(tmp_path / "merged", TEXTS["proverb"][0])
    assert metrics["eval_loss"] == pytest.approx(loss, rel=2e-3)  # bfloat16 model, another batch shape
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-12)
    assert metrics["eval_norm_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"} <= metrics.keys()
    assert merger.state.log_history[-1] == {**metrics, "step": merger.state.global_step}

    record = merger.evaluation
    assert record == load_record(tmp_path / "merged")
    assert record.models == {"math": "expert", "code": "expert", "merged": "merged"}
    assert {(s.model, s.n_tokens) for s in record.scores} == {(m, 6 * len(WORDS) - 1) for m in record.models}
    [distance] = [d for d in record.distances if (d.model, d.other) == ("merged", "code")]
    assert metrics["eval_fisher_rao"] >= distance.fisher_rao.mean > 0
    assert metrics["eval_effective_rank"] == min(row.effective_rank for row in record.collapse())

    other = merger.evaluate(TEXTS["reverse"], metric_key_prefix="test")
    assert other["test_loss"] == pytest.approx(reference_loss(tmp_path / "merged", TEXTS["reverse"][0]), rel=2e-3)
    assert merger.evaluation.domains == ["text", "test"]
    # The second time nothing has changed, and no model is run.
    again = merger.evaluate(metric_key_prefix="eval")
    assert again["eval_loss"] == metrics["eval_loss"] and again["eval_steps_per_second"] == 0


def test_without_experts_only_the_merged_model_is_run(make: Any, models: Path) -> None:
    recorder = Recorder()
    options = {"eval_dataset": TEXTS["proverb"], "evaluate_experts": False, "base_model": str(models / "base")}
    merger = make(callbacks=[recorder], **options).merge()
    merger.evaluate()
    assert recorder.events.count("on_prediction_step") == 1
    assert {score.model for score in merger.evaluation.scores} == {"merged"}
    assert recorder.seen[-1]["model"] is merger.model
    assert not merger.evaluation.distances


def test_compute_metrics_gets_what_trainer_would_give_it(make: Any, tmp_path: Path) -> None:
    """Trainer itself on the merged model is the reference, logits and labels and all."""
    rows = [{"input_ids": [1 + i % 9 for i in range(n)]} for n in (9, 12, 5, 12, 7)]
    seen: list[EvalPrediction] = []

    def compute(prediction: EvalPrediction) -> dict[str, Any]:
        seen.append(prediction)
        predictions, labels = prediction
        return {"sum": predictions[:, :4].sum(), "n": np.int64(len(labels))}

    options = {"eval_packing": False, "per_device_eval_batch_size": 2, "evaluate_experts": False}
    merger = make(eval_dataset=rows, compute_metrics=compute, **options).merge()
    metrics = merger.evaluate()

    def collate(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def pad(value: int) -> torch.Tensor:
            width = max(len(item["input_ids"]) for item in items)
            return torch.tensor([i["input_ids"] + [value] * (width - len(i["input_ids"])) for i in items])

        return {"input_ids": pad(0), "labels": pad(-100), "attention_mask": (pad(-100) != -100).long()}

    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True)
    args.remove_unused_columns = False
    trainer = Trainer(merger.model, args, data_collator=collate, eval_dataset=rows, compute_metrics=compute)
    theirs = trainer.evaluate()
    ours, reference = seen
    assert np.array_equal(ours.label_ids, reference.label_ids)
    assert ours.predictions.shape == reference.predictions.shape == (5, 12, len(set(WORDS)) + 1)
    assert np.allclose(ours.predictions, reference.predictions, atol=1e-6)
    assert metrics["eval_sum"] == pytest.approx(theirs["eval_sum"], rel=1e-5)
    assert type(metrics["eval_n"]) is int and metrics["eval_n"] == 5

    merger.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    merger.evaluate()
    argmax = np.where(reference.label_ids == -100, -100, reference.predictions.argmax(-1))
    assert np.array_equal(np.where(seen[-1].label_ids == -100, -100, seen[-1].predictions), argmax)


def test_the_loss_is_that_of_trainer(make: Any, tmp_path: Path) -> None:
    """On rows of one length: of others, Trainer averages batches, and its loss depends on their size."""
    generator = np.random.default_rng(0)
    rows = [{"input_ids": generator.integers(0, 12, 10).tolist()} for _ in range(7)]
    for row in rows:
        row["labels"] = [-100] * 4 + row["input_ids"][4:]  # as for a prompt that is not scored
    merger = make(eval_dataset=rows, eval_packing=False, evaluate_experts=False).merge()
    ours = merger.evaluate()
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=3, disable_tqdm=True)
    theirs = Trainer(merger.model, args, eval_dataset=Dataset.from_list(rows)).evaluate()
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)  # bfloat16 logits, float32 there
    assert merger.evaluation.scores[0].n_tokens == 7 * 6
    assert merger.evaluation.scores[0].n_samples == 7
    trailing = merger.evaluate([*rows, {"input_ids": [3]}, {"input_ids": []}])
    assert trailing["eval_loss"] == ours["eval_loss"], "there is nothing to predict in a row of one token"


def test_streams_and_tokens_give_the_same_as_text(make: Any, tmp_path: Path) -> None:
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(6)]
    merger = make(evaluate_experts=False).merge()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    dataset = Dataset.from_dict({"text": texts})
    dataset.to_json(tmp_path / "texts.jsonl")
    streamed = load_dataset("json", data_files=str(tmp_path / "texts.jsonl"), split="train", streaming=True)
    tokens = dataset.map(lambda row: tokenizer(row["text"]))
    for packing in (True, False):
        merger.args.eval_packing = packing
        expected = merger.evaluate(texts)["eval_loss"]
        for variant in (dataset, streamed, tokens, tokens.with_format("torch"), tokens.to_iterable_dataset()):
            assert merger.evaluate(variant)["eval_loss"] == expected


def test_evaluation_of_several_datasets_and_of_the_experts(make: Any, models: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    base = str(models / "base")
    merger = make(callbacks=[recorder], eval_dataset=TEXTS, base_model=base, do_eval=True, eval_on_start=True).merge()
    evaluated = [seen for seen in recorder.seen if "metrics" in seen]
    assert [next(iter(seen["metrics"])) for seen in evaluated[:2]] == ["eval_proverb_loss", "eval_reverse_loss"]
    assert [seen["is_last"] for seen in evaluated] == [False, False, True]
    assert {"eval_effective_rank", "eval_norm_ratio", "eval_runtime"} <= evaluated[2]["metrics"].keys()
    before = merger.state.log_history[0]  # eval_on_start
    for model in ("base", "math", "code"):
        for domain, (text,) in TEXTS.items():
            expected = reference_loss(models / model, text)
            assert before[f"eval_{model}_{domain}_loss"] == pytest.approx(expected, rel=2e-3)
    # The experts were known by then: two batches before the merge for each of three models, two after it for one.
    assert recorder.events.count("on_prediction_step") == 8
    merger.evaluate()  # a second time: one row a domain, not two

    written = ModelCard.load(tmp_path / "merged" / "README.md")  # by do_eval
    card = ModelCard.load(merger.create_model_card())
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for domain, seen in zip(TEXTS, evaluated):
        assert measured[domain, "loss"] == pytest.approx(seen["metrics"][f"eval_{domain}_loss"], rel=1e-3)
    assert len(card.data.eval_results) == len(measured) == len(written.data.eval_results)
    assert "| math |" in card.text and "| base |" in card.text


def test_models_larger_than_a_device_are_spread(make: Any, models: Path) -> None:
    spread = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    expected = make(eval_dataset=TEXTS["proverb"]).merge().evaluate()
    merger = make(eval_dataset=TEXTS["proverb"], eval_device_map=spread, overwrite=True).merge()
    actual = merger.evaluate()
    assert set(merger.model.hf_device_map.values()) == {"cpu", "disk"}
    for name in ("eval_loss", "eval_fisher_rao", "eval_effective_rank"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-6)


def test_evaluation_needs_a_dataset_before_any_work(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="do_eval and eval_on_start need eval_dataset"):
        make(do_eval=True).merge()
    assert not (tmp_path / "merged").exists()
    merger = make().merge()
    for call in (merger.evaluate, merger.evaluate_experts):
        with pytest.raises(ArgumentError, match=r"needs a dataset: pass eval_dataset"):
            call()


def test_a_guard_on_the_evaluation_forbids_the_push(make: Any, hub: HubServer) -> None:
    guard = CollapseGuardCallback(thresholds=["perplexity>1.5"])
    merger = make(callbacks=[guard], eval_dataset=TEXTS["proverb"], do_eval=True).merge()
    with pytest.raises(MergeError, match=r"Not pushed: collapse guard: text: eval_perplexity is \d+"):
        merger.push_to_hub("alice/merged", token=ALICE_TOKEN)
    assert not hub.repos


def test_a_guard_on_the_activations_names_the_layer_and_forbids_the_push(make: Any, hub: HubServer) -> None:
    # No merge is 7 times as varied as its experts.
    guard = CollapseGuardCallback(thresholds=["effective_rank<7", "perplexity>1e9"])
    merger = make(callbacks=[guard], eval_dataset=TEXTS, do_eval=True).merge()
    worst = min(merger.evaluation.collapse(), key=lambda row: row.effective_rank)
    assert [(trip.where, trip.name) for trip in guard.trips] == [(f"layer {worst.layer}", "eval_effective_rank")]
    with pytest.raises(MergeError, match=rf"collapse guard: layer {worst.layer}: .* \(guard: effective_rank<7\)"):
        merger.push_to_hub("alice/merged", token=ALICE_TOKEN)
    assert not hub.repos


def test_tensorboard_holds_the_merge_and_its_evaluation(
    make: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    merger = make(report_to="tensorboard", logging_steps=6, eval_dataset=TEXTS["proverb"]).merge()
    metrics = merger.evaluate()
    merger.callback_handler.on_merge_end(merger.args, merger.state, merger.control)  # flushes the evaluation
    scalars: dict[str, list[tuple[int, float]]] = {}
    for path in (tmp_path / "runs").rglob("events.out.tfevents.*"):
        events = accumulator.EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    n = n_tensors(models)
    logged = [entry for entry in merger.state.log_history if "max_angle" in entry]
    assert [step for step, _ in scalars["train/max_angle"]] == list(range(6, n + 1, 6))
    assert [value for _, value in scalars["train/max_angle"]] == pytest.approx([e["max_angle"] for e in logged])
    assert scalars["train/merge_n_merged"] == [(n, n)]
    assert scalars["eval/loss"] == [(n, pytest.approx(metrics["eval_loss"], rel=1e-6))]
    assert not (tmp_path / "merged" / "runs").exists()


def test_save_model_copies_a_whole_model(make: Any, tmp_path: Path) -> None:
    merger = make().merge()
    merger.save_model()  # where it is already
    merger.save_model(str(tmp_path / "copy"))
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "merge_manifest.json", "README.md"} <= names
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    assert verify(str(tmp_path / "copy")).ok


def test_push_of_experts_on_the_hub_is_loaded_and_verified_from_there(
    make: Any, models: Path, hub: HubServer, tmp_path: Path
) -> None:
    for name in ("base", "math", "code"):
        files = {path.name: path.read_bytes() for path in (models / name).iterdir()}
        card = f"---\nlicense: apache-2.0\nlanguage: [en]\n---\n# {name}\n".encode()
        hub.add_repo(f"ann/{name}", {**files, "README.md": card})
    merger = make(experts=["ann/math@main", "ann/code"], base_model="ann/base", space="deltas", hub_token=ALICE_TOKEN)
    assert merger.merge().push_to_hub("merged").oid == hub.repos["models", "alice/merged"].branches["main"]

    local = load_file(tmp_path / "merged" / "model.safetensors")
    pushed = AutoModelForCausalLM.from_pretrained("alice/merged").state_dict()
    assert all(torch.equal(pushed[name], tensor) for name, tensor in local.items())
    card = ModelCard.load("alice/merged").data
    assert card.base_model == ["ann/math", "ann/code", "ann/base"]
    assert (card.base_model_relation, card.license) == ("merge", "apache-2.0")
    assert {"merge", "hf-frmerge"} <= set(card.tags)
    commits = [hub.repos["models", f"ann/{name}"].branches["main"] for name in ("math", "code", "base")]
    assert [source["revision"] for source in merger.state.sources] == commits

    report = verify("alice/merged")  # experts found by the commits in the manifest, nothing local
    assert report.ok, report.problems
    assert report.checked_tensors == len(local)
    for blob in hub.repos["models", "alice/merged"].commit_of("main").files.values():
        assert ALICE_TOKEN.encode() not in blob.data and str(tmp_path).encode() not in blob.data


def test_a_push_in_the_background_and_one_the_hub_refuses(make: Any, hub: HubServer) -> None:
    merger = make(hub_model_id="lab/merged", hub_private_repo=True).merge()
    assert merger.push_to_hub(blocking=False, token=ALICE_TOKEN).result().oid
    assert hub.repos["models", "lab/merged"].private
    with pytest.raises(HubError, match=r"hf auth login"):
        merger.push_to_hub(token="wrong-token")


def test_push_to_hub_pushes_at_the_end_of_the_merge(make: Any, hub: HubServer) -> None:
    make(push_to_hub=True, hub_model_id="lab/merged", hub_token=ALICE_TOKEN).merge()
    pushed = hub.repos["models", "lab/merged"].commit_of("main").files
    assert {"model.safetensors", "config.json", "README.md", "merge_manifest.json"} <= set(pushed)


def test_nothing_is_pushed_or_described_before_the_merge(make: Any) -> None:
    with pytest.raises(RuntimeError, match=r"`push_to_hub` needs a merged model: call `merge\(\)` first"):
        make().push_to_hub("alice/merged")


def test_licences_without_derivatives_are_refused_unless_allowed(make: Any, models: Path, tmp_path: Path) -> None:
    closed = Path(shutil.copytree(models / "code", tmp_path / "closed"))
    (closed / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n")
    experts = [str(models / "math"), str(closed)]
    with pytest.raises(MergeError, match=r"closed \(cc-by-nc-nd-4.0\) does not allow derived works"):
        make(experts=experts).merge()
    assert not (tmp_path / "merged").exists()
    assert make(experts=experts, allow_license="cc-by-nd-4.0, cc-by-nc-nd-4.0").merge().is_merged
    assert "cc-by-nc-nd-4.0" in (tmp_path / "merged" / "README.md").read_text()


_API = """
from hf_frmerge import FisherRaoMerger, MergingArguments
merger = FisherRaoMerger({experts!r}, MergingArguments(output_dir={output!r}, disable_tqdm=True)).merge()
assert merger.is_merged
"""
_CLI = """
from hf_frmerge.cli.main import main
main(["merge", *{experts!r}, "--output-dir", {output!r}], standalone_mode=False)
main(["verify", {output!r}], standalone_mode=False)
main(["card", {output!r}], standalone_mode=False)
"""


@pytest.mark.parametrize("script", [_API, _CLI], ids=["api", "cli"])
def test_merging_local_checkpoints_imports_neither_torch_nor_transformers(tmp_path: Path, script: str) -> None:
    pytest.importorskip("hf_frmerge.kernels._native")
    _, experts = write_family(tmp_path, 2)
    output = tmp_path / "merged"
    check = (
        "import sys\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'datasets'} & sys.modules.keys()\n"
        "assert not heavy, sorted(heavy)\n"
    )
    code = script.format(experts=experts, output=str(output)) + check
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((output / "merge_manifest.json").read_text())["method"] == "karcher"


_STEP = """
import sys
from hf_frmerge import FisherRaoMerger, MergeCallback, MergingArguments
class Watch(MergeCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.modules = set(sys.modules)
watch = Watch()
arguments = MergingArguments(output_dir={output!r}, disable_tqdm=True)
FisherRaoMerger({experts!r}, arguments, callbacks=[watch]).merge()
def seen(modules, *names):
    return sorted(m for m in modules if any(m == name or m.startswith(name + ".") for name in names))
card = seen(watch.modules, "jinja2", "yaml", "huggingface_hub", "hf_frmerge.hub.card.card")
assert not card, card
rooms = ["evaluation", "extraction", "provenance", "report", "demo", "cli"]
rooms += ["checkpoints.adapters.adapter", "merging.operands.factor_inputs", "merging.outputs.factor_output"]
unused = seen(watch.modules, "concurrent")  # older versions of the Hub's client import it for the card
unused += seen(sys.modules, "threadpoolctl", "difflib", *("hf_frmerge." + room for room in rooms))
assert not unused, unused
"""


def test_a_merge_imports_what_it_uses_when_it_uses_it(tmp_path: Path) -> None:
    """Imports are a quarter of the CPU time of a small merge: those of the card come with it."""
    pytest.importorskip("hf_frmerge.kernels._native")
    _, experts = write_family(tmp_path, 2)
    code = _STEP.format(experts=experts, output=str(tmp_path / "merged"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "merged" / "README.md").is_file()


def test_experts_must_be_a_list_not_one_name(make: Any) -> None:
    with pytest.raises(ArgumentError, match=r"experts .*list"):
        make(experts="org/model")


@pytest.fixture(scope="module")
def adapters(models: Path) -> list[str]:
    """Two LoRA adapters of `base`."""
    for seed in range(2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        base = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
        get_peft_model(base, lora).save_pretrained(models / f"adapter{seed}")
    return [str(models / f"adapter{seed}") for seed in range(2)]


def test_merged_adapters_are_evaluated_on_their_base(
    make: Any, models: Path, adapters: list[str], tmp_path: Path
) -> None:
    recorder = Recorder()
    options = {"experts": adapters, "base_model": str(models / "base"), "eval_dataset": TEXTS["proverb"]}
    merger = make(**options, callbacks=[recorder]).merge()
    assert (tmp_path / "merged" / "adapter_config.json").is_file()
    assert (merger.state.global_step, merger.state.max_steps) == (4, 4)  # modules
    metrics = merger.evaluate()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "base"), tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(models / "base")(TEXTS["proverb"][0], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=2e-3)
    card = ModelCard.load(merger.create_model_card())
    assert card.data.library_name == "peft"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results}["loss"] == pytest.approx(expected, rel=2e-3)


def test_stops_are_obeyed_in_merges_of_adapters(make: Any, adapters: list[str], tmp_path: Path) -> None:
    recorder = Recorder()
    merger = make(experts=adapters, callbacks=[StopAfter(2), recorder])
    with pytest.raises(MergeError, match=r"stopped after 2 of 4 tensors: the kettle boils"):
        merger.merge()
    assert recorder.events[-1] == "on_merge_end" and not merger.is_merged
    assert not list((tmp_path / "merged").glob("[!.]*"))
    merger.remove_callback(StopAfter)
    assert merger.merge(resume_from_checkpoint=True).is_merged
    assert verify(str(tmp_path / "merged")).ok
