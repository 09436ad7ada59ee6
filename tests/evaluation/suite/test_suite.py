"""The whole suite on tiny models, against float64 code that keeps every logit and every activation."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import log_softmax
from tiny_models import save_llama_family
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)
from two_processes import run_on_two_processes

from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.evaluation.suite.result_store import Measured
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.suite.suite import evaluate_suite
from hf_frmerge.geometry.simplex import barycentre, fisher_rao_distance

WORDS = [f"w{number}" for number in range(50)]
TEXTS = {
    "math": [" ".join(np.random.default_rng(1).choice(WORDS, 90))],
    "code": [" ".join(np.random.default_rng(2).choice(WORDS, 41)), "w1 w2 w3"],
}
ROLES = {"base": "base", "math": "expert", "code": "expert", MERGED: "merged"}
WEIGHTS = {"math": 0.7, "code": 0.3}
BLOCK = 12
EXACT = SuiteOptions(block_size=BLOCK, top_k=0, dtype="float32", n_worst=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `math`, `code` and `merged`, far enough apart for distances to differ."""
    root = tmp_path_factory.mktemp("suite")
    save_llama_family(root, WORDS, spread=0.4)
    models = [AutoModelForCausalLM.from_pretrained(root / name) for name in ("math", "code")]
    merged = AutoModelForCausalLM.from_pretrained(root / "base")
    for target, *sources in zip(merged.parameters(), *(model.parameters() for model in models)):
        target.data = sum(source.data for source in sources) / len(sources)
    merged.save_pretrained(root / MERGED)
    return root


def specs(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in ROLES}


def run(folder: Path, cache: Path, *, domains=TEXTS, options=EXACT, on_model=None, on_step=None, **models):
    """Evaluate the four models, or what `models` says of them otherwise."""
    model_set = ModelSet(**{"specs": specs(folder), "roles": ROLES, "weights": WEIGHTS, **models})
    followed = RunSettings(cache_dir=cache, on_model=on_model, on_prediction_step=on_step)
    return evaluate_suite(model_set, domains, options, followed)


@pytest.fixture(scope="module")
def record(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationRecord:
    return run(folder, tmp_path_factory.mktemp("cache"))


class Naive:
    """Every prediction and hidden state of a model on a text, block by block, in float64."""

    def __init__(self, path: Path, rows: list[str]) -> None:
        ids = [1 + WORDS.index(word) for row in rows for word in row.split()]
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        logits, states = [], []
        for start in range(0, len(ids) - 1, BLOCK - 1):
            block = torch.tensor([ids[start : start + BLOCK]])
            with torch.no_grad():
                output = model(input_ids=block, output_hidden_states=True)
            logits.append(output.logits[0, :-1].numpy())
            states.append([state[0].numpy() for state in output.hidden_states])
        self.log_p = log_softmax(np.concatenate(logits), axis=-1)
        self.p = np.exp(self.log_p)
        self.targets = np.array(ids[1:])
        self.states = [np.concatenate(layer) for layer in zip(*states)]


@pytest.fixture(scope="module")
def naive(folder: Path) -> dict[tuple[str, str], Naive]:
    return {(name, domain): Naive(folder / name, rows) for name in ROLES for domain, rows in TEXTS.items()}


def test_scores_are_the_naive_ones(record: EvaluationRecord, naive: dict) -> None:
    assert [(s.model, s.domain) for s in record.scores] == [(m, d) for d in TEXTS for m in ROLES]
    for score in record.scores:
        exact = naive[score.model, score.domain]
        log_prob = np.take_along_axis(exact.log_p, exact.targets[:, None], axis=1)
        assert score.n_tokens == len(exact.targets)
        assert score.metrics["loss"] == pytest.approx(-log_prob.mean(), rel=1e-6)
        assert score.metrics["perplexity"] == pytest.approx(math.exp(-log_prob.mean()), rel=1e-5)
        assert score.metrics["token_accuracy"] == np.mean(exact.p.argmax(-1) == exact.targets)


def test_distances_are_the_naive_ones(record: EvaluationRecord, naive: dict) -> None:
    names = list(ROLES)
    expected = [(one, two, domain) for domain in TEXTS for i, one in enumerate(names) for two in names[:i]]
    assert [(d.model, d.other, d.domain) for d in record.distances] == expected
    for row in record.distances:
        q, p = naive[row.model, row.domain], naive[row.other, row.domain]
        distance = 2 * np.arccos(np.minimum(np.sqrt(p.p * q.p).sum(-1), 1))
        middle = np.log(0.5 * (p.p + q.p))
        js = 0.5 * ((p.p * (p.log_p - middle)).sum(-1) + (q.p * (q.log_p - middle)).sum(-1))
        assert row.fisher_rao.mean == pytest.approx(distance.mean(), abs=1e-6)
        assert row.fisher_rao.median == pytest.approx(np.median(distance), abs=3e-6)
        assert row.fisher_rao.p95 == pytest.approx(np.quantile(distance, 0.95), abs=3e-6)
        assert row.fisher_rao.max == pytest.approx(distance.max(), abs=3e-6)
        assert row.mean_squared == pytest.approx((distance**2).mean(), abs=1e-6)
        assert row.kl_other_model == pytest.approx((p.p * (p.log_p - q.log_p)).sum(-1).mean(), abs=1e-6)
        assert row.kl_model_other == pytest.approx((q.p * (q.log_p - p.log_p)).sum(-1).mean(), abs=1e-6)
        assert row.jensen_shannon == pytest.approx(js.mean(), abs=1e-6)
        assert row.top1_agreement == np.mean(p.p.argmax(-1) == q.p.argmax(-1))
        assert row.error == 0
        assert [count for _, count in row.histogram] == np.histogram(distance, 32, (0, math.pi))[0].tolist()
    assert min(row.fisher_rao.mean for row in record.distances) > 0.1, "models that agree would test nothing"


def test_the_objective_and_the_barycentre_are_the_naive_ones(record: EvaluationRecord, naive: dict) -> None:
    alpha = np.array(list(WEIGHTS.values()))
    for row in record.objectives:
        experts = np.stack([naive[name, row.domain].p for name in WEIGHTS], axis=1)
        merged = naive[MERGED, row.domain].p
        centre = barycentre(experts, alpha)
        value = (fisher_rao_distance(merged[:, None], experts) ** 2 @ alpha).mean()
        lowest = (fisher_rao_distance(centre[:, None], experts) ** 2 @ alpha).mean()
        assert row.value == pytest.approx(value, abs=1e-6)
        assert row.lowest == pytest.approx(lowest, abs=1e-6)
        assert row.to_barycentre.mean == pytest.approx(fisher_rao_distance(merged, centre).mean(), abs=1e-6)
        assert row.lowest < row.value and row.error == 0


def test_layers_are_the_naive_ones(record: EvaluationRecord, naive: dict) -> None:
    assert [(r.model, r.layer) for r in record.layers] == [(name, layer) for name in ROLES for layer in range(3)]
    for row in record.layers:
        states = np.concatenate([naive[row.model, domain].states[row.layer] for domain in TEXTS])
        assert row.activation_variance == pytest.approx(states.var(axis=0).mean(), rel=1e-5)
        share = np.linalg.eigvalsh(np.cov(states.T))
        share = share / share.sum()
        assert row.effective_rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_worst_tokens_are_the_farthest_and_can_be_found_in_the_text(record: EvaluationRecord, naive: dict) -> None:
    assert len(record.worst_tokens) == 2 * 2 * 3
    for domain, rows in TEXTS.items():
        words = " ".join(rows).split()
        for expert in WEIGHTS:
            p, q = naive[expert, domain], naive[MERGED, domain]
            distance = fisher_rao_distance(p.p, q.p)
            actual = [row for row in record.worst_tokens if (row.expert, row.domain) == (expert, domain)]
            for row, place in zip(actual, np.argsort(-distance)):
                assert row.distance == pytest.approx(distance[place], abs=3e-6)
                assert row.token == words[place + 1]
                assert " ".join(words[: place + 1]).endswith(row.context) and row.context
                vocabulary = ["<unk>", *WORDS]
                assert row.expert_guess == vocabulary[p.p[place].argmax()]
                assert row.merged_guess == vocabulary[q.p[place].argmax()]
                assert row.expert_probability == pytest.approx(p.p[place, p.targets[place]], rel=1e-5)


def test_recovery_and_settings(record: EvaluationRecord) -> None:
    losses = {(score.model, score.domain): score.metrics["loss"] for score in record.scores}
    for row in record.recovery:
        assert row.domain == row.expert
        assert row.gain == losses["base", row.domain] - losses[row.expert, row.domain]
        assert row.kept == losses["base", row.domain] - losses[MERGED, row.domain]
        assert row.share == (pytest.approx(row.kept / row.gain) if row.gain > 0 else None)
    assert record.weights == WEIGHTS and record.models == ROLES
    n_tokens = 90 + math.ceil(89 / 11) - 1 + 44 + math.ceil(43 / 11) - 1  # blocks overlap by one
    assert record.settings == {
        "block_size": BLOCK,
        "dtype": "float32",
        "top_k": 0,
        "n_processes": 1,
        "packing": True,
        "n_tokens": n_tokens,
        "n_features": 16,
    }


def test_too_few_tokens_for_a_rank_are_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(folder, tmp_path, domains={"short": ["w1 w2 w3 w4"]})
    assert "4 tokens in 16 dimensions" in caplog.text


def test_batch_size_does_not_matter(folder: Path, record: EvaluationRecord, tmp_path: Path) -> None:
    options = SuiteOptions(**{**vars(EXACT), "batch_size": 3})  # 8 leaves no short batch
    assert_close(run(folder, tmp_path, options=options), record, 1e-6)


def assert_close(actual: EvaluationRecord, wanted: EvaluationRecord, tolerance: float) -> None:
    """All numbers equal up to a tolerance, all else equal."""

    def compare(one, two, where: str) -> None:
        if isinstance(one, dict):
            assert one.keys() == two.keys(), where
            for key in one:
                compare(one[key], two[key], f"{where}.{key}")
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(two), where
            for index, (a, b) in enumerate(zip(one, two)):
                compare(a, b, f"{where}[{index}]")
        elif isinstance(one, float) and not isinstance(one, bool):
            assert one == pytest.approx(two, rel=tolerance, abs=tolerance), where
        else:
            assert one == two, where

    compare(actual.to_dict(), wanted.to_dict(), "record")


def test_a_second_merge_pays_only_for_itself(folder: Path, record: EvaluationRecord, tmp_path: Path) -> None:
    ran: list[str] = []
    first = run(folder, tmp_path, on_model=ran.append)
    assert ran == list(ROLES)
    again = run(folder, tmp_path, on_model=ran.append)
    assert ran == list(ROLES) and again == first
    ran.clear()
    other = run(folder, tmp_path, specs=specs(folder) | {MERGED: folder / "base"}, on_model=ran.append)
    assert ran == [MERGED]
    same = [row for row in other.distances if MERGED not in (row.model, row.other)]
    assert same == [row for row in first.distances if MERGED not in (row.model, row.other)]
    to_base = next(row for row in other.distances if (row.model, row.other) == (MERGED, "base"))
    assert to_base.fisher_rao.max < 1e-5 and to_base.top1_agreement == 1
    assert_close(first, record, 0)


def test_changed_text_weights_or_options_miss_the_cache(folder: Path, tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in ("base", MERGED)}
    for name, path in models.items():
        shutil.copytree(folder / name, path)
    ran: list[str] = []

    def again(**changes) -> EvaluationRecord:
        ran.clear()
        return run(folder, tmp_path / "cache", specs=models, weights=None, on_model=ran.append, **changes)

    again()
    assert ran == ["base", MERGED]
    again(domains=TEXTS | {"code": ["w1 w2 w4"]})
    assert ran == ["base", MERGED]
    again(options=SuiteOptions(**{**vars(EXACT), "block_size": 7}))
    assert ran == ["base", MERGED]
    shutil.copytree(folder / "math", models[MERGED], dirs_exist_ok=True)
    again()
    assert ran == [MERGED]
    # A file that lost its end, as after a crash of the disk, is found out and measured again.
    whole = again()
    assert ran == []
    for victim in (tmp_path / "cache").glob("*/0.safetensors"):
        victim.write_bytes(victim.read_bytes()[:-8])
    assert again() == whole
    assert ran == ["base", MERGED]


def test_damaged_results_of_one_model_are_measured_again(folder: Path, tmp_path: Path) -> None:
    ran: list[str] = []

    def again() -> EvaluationRecord:
        ran.clear()
        models = {"base": folder / "base", MERGED: folder / "math"}
        return run(folder, tmp_path / "cache", specs=models, weights=None, on_model=ran.append)

    whole = again()
    victim = next((tmp_path / "cache").glob("*/measured.json"))
    victim.write_bytes(victim.read_bytes()[:-1])
    assert again() == whole
    assert len(ran) == 1


@pytest.mark.parametrize(
    "damage", [b"{", b'{"layers": 1}', b"[]", b'{"a": 1, "a": 2}', b"\xff", b'{"layers": [{"x": 1}]}', b"[" * 9999]
)
def test_what_is_no_result_is_told_from_one(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "measured.json").write_bytes(damage)
    with pytest.raises(ValueError):  # the sentence is of those who read it
        Measured.read(tmp_path / "measured.json")


def test_a_model_that_changes_while_it_is_measured_is_not_kept(
    folder: Path, record: EvaluationRecord, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "models")
    path = tmp_path / "models" / "code" / "model.safetensors"
    original = path.read_bytes()

    def retrain(name: str) -> None:
        if name == "code":  # between the digest of its files and the loading of it
            path.write_bytes((folder / "math" / "model.safetensors").read_bytes())

    with pytest.raises(CheckpointError, match=r"code': model\.safetensors changed while it was evaluated"):
        run(tmp_path / "models", tmp_path / "cache", on_model=retrain)
    path.write_bytes(original)
    assert_close(run(tmp_path / "models", tmp_path / "cache"), record, 1e-12)


def test_nothing_unfinished_stays(folder: Path, tmp_path: Path) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, on_step=stop)
    assert list(tmp_path.iterdir()) == []


def test_models_in_memory_and_adapters(folder: Path, record: EvaluationRecord, tmp_path: Path) -> None:
    live = {name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ROLES}
    tokenizer_of_base = specs(folder) | {MERGED: live[MERGED]}
    assert_close(run(folder, tmp_path / "a", specs=tokenizer_of_base), record, 1e-9)
    assert not list((tmp_path / "a").glob("*live*"))

    torch.manual_seed(0)
    adapters = {}
    for name in ("math", "code"):
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = get_peft_model(base, lora)
        adapted.save_pretrained(tmp_path / name)
        adapted.merge_and_unload().save_pretrained(tmp_path / f"{name}-whole")
    adapters = {"base": folder / "base", "math": tmp_path / "math", "code": tmp_path / "code", MERGED: folder / MERGED}
    whole = adapters | {name: tmp_path / f"{name}-whole" for name in ("math", "code")}
    actual = run(folder, tmp_path / "b", specs=adapters)
    assert_close(actual, run(folder, tmp_path / "c", specs=whole), 2e-5)
    without_base_row = {name: spec for name, spec in adapters.items() if name != "base"}
    with pytest.raises(ArgumentError, match=r"adapter.*base_model"):
        run(folder, tmp_path / "d", specs=without_base_row)
    alone = run(folder, tmp_path / "d", specs=without_base_row, base_model=folder / "base")
    assert alone.objectives == actual.objectives and alone.recovery == []


def test_encoders_have_layers_and_nothing_that_needs_the_next_token(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    for seed, name in enumerate(("base", MERGED)):
        torch.manual_seed(seed)
        BertForMaskedLM(BertConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / name)
    rows = {"a": [{"input_ids": list(range(2, 40))}]}
    models = {name: tmp_path / name for name in ("base", MERGED)}
    record = run(tmp_path, tmp_path / "cache", domains=rows, specs=models, weights=None)
    assert [(row.model, row.layer) for row in record.layers] == [(m, layer) for m in models for layer in range(3)]
    assert not record.scores and not record.distances and not record.generations


def test_refuses_what_it_cannot_measure(folder: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    with pytest.raises(CheckpointError, match="nowhere"):
        run(folder, tmp_path, specs=specs(folder) | {"code": "./nowhere"}, on_model=ran.append)
    with pytest.raises(ArgumentError, match="no role"):
        run(folder, tmp_path, roles={"base": "base"}, on_model=ran.append)
    with pytest.raises(ArgumentError, match="at least one"):
        run(folder, tmp_path, domains={}, on_model=ran.append)
    with pytest.raises(ArgumentError, match="weight of the expert 'code' is None"):
        run(folder, tmp_path, weights={"math": 1.0}, on_model=ran.append)
    with pytest.raises(ArgumentError, match="all experts are 0"):
        run(folder, tmp_path, weights={"math": 0.0, "code": 0.0}, on_model=ran.append)
    with pytest.raises(ArgumentError, match="at least one"):
        run(folder, tmp_path, specs={}, on_model=ran.append)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=60, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    ).save_pretrained(tmp_path / "larger")
    with pytest.raises(ArgumentError, match="different sizes"):
        run(folder, tmp_path, specs=specs(folder) | {"code": tmp_path / "larger"}, on_model=ran.append)
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8}
    T5Model(T5Config(vocab_size=50, d_model=8, d_kv=8, d_ff=8, num_layers=1)).save_pretrained(tmp_path / "t5")
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    for kind, sentence in (
        ("t5", "'code' .t5. is an encoder-decoder without a head"),
        ("vit", "'code' .vit. is no model of text"),
    ):
        with pytest.raises(ArgumentError, match=sentence):
            run(folder, tmp_path, specs=specs(folder) | {"code": tmp_path / kind}, on_model=ran.append)
    assert ran == []


@pytest.mark.slow
def test_two_processes_find_the_same_to_1e_9(folder: Path, tmp_path: Path) -> None:
    # 9 and 4 blocks, in batches of 2: the second process has fewer; and a text of which it has nothing at all.
    texts = TEXTS | {"short": ["w1 w2 w3 w4 w5 w6"]}
    exact = {"block_size": BLOCK, "top_k": 0, "dtype": "float32", "batch_size": 2, "max_new_tokens": 4}
    options = [exact, exact | {"top_k": 5}]
    models = {name: str(path) for name, path in specs(folder).items()}
    arguments = {"models": {"specs": models, "roles": ROLES, "weights": WEIGHTS}, "domains": texts, "options": options}
    (tmp_path / "suite.json").write_text(json.dumps(arguments))
    ranks = run_on_two_processes("suites", tmp_path)
    assert ranks[0] == ranks[1]
    for actual, option in zip(ranks[0], options, strict=True):
        assert actual["settings"].pop("n_processes") == 2
        alone = run(folder, tmp_path / "alone", domains=texts, options=SuiteOptions(**option))
        assert alone.settings.pop("n_processes") == 1
        n_tokens = {score.domain: score.n_tokens for score in alone.scores}
        assert n_tokens == {name: len(" ".join(rows).split()) - 1 for name, rows in texts.items()}
        assert_close(EvaluationRecord.from_dict(actual), alone, 1e-9)
