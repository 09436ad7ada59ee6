"""`FisherRaoMerger` end to end, on a tiny real language model with a real tokenizer."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import ALICE_TOKEN, HubServer
from huggingface_hub import ModelCard
from merge_reference import write_family
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import save_llama_family
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_frmerge import (
    CollapseGuardCallback,
    FisherRaoMerger,
    MergeCallback,
    MergingArguments,
    PrinterCallback,
    ProgressCallback,
)
from hf_frmerge.errors import ArgumentError, HubError, MergeError
from hf_frmerge.merging.verify import verify

WORDS = ["the", "house", "of", "wisdom", "has", "many", "rooms", "and", "each", "room", "opens", "on", "another"]
TEXTS = {"proverb": [" ".join(WORDS * 6)], "reverse": [" ".join(WORDS[::-1] * 6)]}
EVENTS = [name for name in vars(MergeCallback) if name.startswith("on_")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `base`, `math` and `code`: bfloat16, tied, 20 tensors; the experts at wide angles in delta space."""
    root = tmp_path_factory.mktemp("models")
    save_llama_family(root, WORDS, 0.05)
    return root


@pytest.fixture
def make(models: Path, tmp_path: Path) -> Any:
    """Make a merger of the two experts into `tmp_path/merged`."""

    def build(*, callbacks: Any = None, **options: Any) -> FisherRaoMerger:
        own = {"eval_dataset", "compute_metrics", "weights", "base_model", "processing_class", "experts"}
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
        "on_prediction_step", "on_log", "on_evaluate", "on_push_begin",
    ]  # fmt: skip
    assert recorder.events.count("on_step_begin") == n
    begun = 0
    for index, event in enumerate(recorder.events):  # no tensor ends that has not begun
        begun += event == "on_step_begin"
        assert recorder.events[: index + 1].count("on_step_end") <= begun
    results = [seen["result"].name for seen in recorder.seen if "result" in seen]
    assert results == list(load_file(models / "math" / "model.safetensors"))
    by_event = dict(zip(recorder.events, recorder.seen, strict=True))
    assert by_event["on_evaluate"]["model"] is merger.model
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
    merger.merge(resume_from_checkpoint=True)
    assert (merger.state.global_step, merger.state.epoch) == (n, 1.0)
    fresh = make(output_dir=str(tmp_path / "fresh")).merge()
    assert fresh.report["n_merged"] == n
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "fresh" / "model.safetensors").read_bytes()


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


def test_evaluation_of_one_dataset(make: Any, tmp_path: Path) -> None:
    def compute_metrics(metrics: dict[str, float]) -> dict[str, float]:
        return {"bits": metrics["loss"] / math.log(2)}

    merger = make(eval_dataset=TEXTS["proverb"], compute_metrics=compute_metrics).merge()
    metrics = merger.evaluate()
    loss = reference_loss(tmp_path / "merged", TEXTS["proverb"][0])
    assert metrics["eval_loss"] == pytest.approx(loss, rel=2e-3)  # bfloat16 model, another batch shape
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-12)
    assert metrics["eval_bits"] == pytest.approx(metrics["eval_loss"] / math.log(2), rel=1e-12)
    assert metrics["eval_n_tokens"] == 6 * len(WORDS) - 1
    assert merger.state.log_history[-1] == {**metrics, "step": merger.state.global_step}
    other = merger.evaluate(TEXTS["reverse"], ignore_keys=["bits"], metric_key_prefix="test")
    assert set(other) == {"test_loss", "test_perplexity", "test_token_accuracy", "test_n_tokens"}
    assert other["test_loss"] == pytest.approx(reference_loss(tmp_path / "merged", TEXTS["reverse"][0]), rel=2e-3)


def test_evaluation_of_several_datasets_and_of_the_experts(make: Any, models: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    base = str(models / "base")
    merger = make(callbacks=[recorder], eval_dataset=TEXTS, base_model=base, do_eval=True, eval_on_start=True).merge()
    evaluated = [seen["metrics"] for seen in recorder.seen if "metrics" in seen]
    assert [next(iter(metrics)) for metrics in evaluated] == ["eval_proverb_loss", "eval_reverse_loss"]
    before = merger.state.log_history[0]  # eval_on_start
    for model in ("base", "math", "code"):
        for domain, (text,) in TEXTS.items():
            expected = reference_loss(models / model, text)
            assert before[f"eval_{model}_{domain}_loss"] == pytest.approx(expected, rel=2e-3)
    merger.evaluate()  # a second time: one row a domain, not two

    card = ModelCard.load(merger.create_model_card())
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    for domain, metrics in zip(TEXTS, evaluated, strict=True):
        assert measured[domain, "loss"] == pytest.approx(metrics[f"eval_{domain}_loss"], rel=1e-3)
    assert len(card.data.eval_results) == len(measured)
    assert "| math |" in card.text and "| base |" in card.text


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
    with pytest.raises(MergeError, match=r"Not pushed: collapse guard: evaluation: eval_perplexity is \d+"):
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
    assert not [path.name for path in (tmp_path / "merged").iterdir() if not path.name.startswith(".")]
    merger.remove_callback(StopAfter)
    assert merger.merge(resume_from_checkpoint=True).is_merged
    assert verify(str(tmp_path / "merged")).ok
