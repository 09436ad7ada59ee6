"""Controls of the benchmark on tiny models: what they write is nearer to the experts than what they began with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from tiny_models import save_llama_family
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge.calibration.blocks.blockwise_model import Outputs

SCRIPTS = Path(__file__).parents[2] / "scripts"
WORDS = ["alpha", "beta", "gamma", "delta", "house", "room", "door", "other"]
DOMAINS = {"math": WORDS[:6], "code": WORDS[2:]}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_function_space
    import distil_control

    for module in ("bench_function_space", "distil_control"):
        monkeypatch.delitem(sys.modules, module)
    return bench_function_space, distil_control


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts of it in a suite, and texts of both for the prompts."""
    folder = tmp_path_factory.mktemp("suite")
    save_llama_family(folder, WORDS, 0.1)
    (folder / "experts").mkdir()
    for name, words in DOMAINS.items():
        (folder / name).rename(folder / "experts" / name)
        generator = torch.Generator().manual_seed(len(words))
        texts = [
            " ".join(words[int(i)] for i in torch.randint(len(words), (40,), generator=generator)) for _ in range(40)
        ]
        (folder / f"{name}.calibration.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def divergence(folder: Path, merged: Any) -> float:
    """Mean of KL(expert || merged) over the experts' texts, in float64."""
    total = 0.0
    for name in DOMAINS:
        expert = AutoModelForCausalLM.from_pretrained(folder / "experts" / name, dtype=torch.float64).eval()
        p, q = (log_probabilities(folder, name, model) for model in (expert, merged))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(DOMAINS)


def log_probabilities(folder: Path, name: str, model: Any) -> torch.Tensor:
    """Log-probabilities of every token of an expert's texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    lines = (folder / f"{name}.calibration.jsonl").read_text().splitlines()
    ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"] for line in lines])
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits, dim=-1)


@pytest.mark.parametrize("kind", ["all", "lora", "samerging"])
def test_a_control_comes_nearer_to_the_experts(
    folder: Path,
    tmp_path: Path,
    scripts: tuple[ModuleType, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    # As the benchmark calls it, for the first of its rows of this kind.
    bench, control = scripts
    common = ["--suite", str(folder / "experts"), "--texts", str(folder), "--base", str(folder / "base")]
    counts = ["--prompts", "16", "--self", "--random", "8"]
    monkeypatch.setattr(sys, "argv", ["bench", *common, "--methods", *counts, "--refine", "7", "--distil", "20"])
    args = bench.parse_args()
    rows = bench.merges(args, ["math", "code"])
    assert [row.name for row in rows] == [
        "16 prompts, seed 42", "16 prompts, seed 42, refined",
        "8 prompts of random tokens, seed 42", "8 prompts of random tokens, seed 42, refined",
        "all weights distilled, 16 prompts, seed 42", "fresh LoRA distilled, 16 prompts, seed 42",
        "AdaMerging, 16 prompts, seed 42", "SAMerging, 16 prompts, seed 42",
        "SAMerging along random directions, 16 prompts, seed 42",
    ]  # fmt: skip
    assert "--refine=7" in rows[1].options and not rows[1].is_control
    (row,) = (row for row in rows if row.is_control and row.options[0] == kind)
    rate = "0.1" if kind == "samerging" else "3e-3"
    options = [*row.options, "--learning-rate", rate, "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["control", *options])
    control.main()

    load = AutoModelForCausalLM.from_pretrained
    start = load(folder / "base", dtype=torch.float64).eval()
    if kind != "lora":
        experts = [load(folder / "experts" / name, dtype=torch.float64).state_dict() for name in DOMAINS]
        start.load_state_dict({name: (values + experts[1][name]) / 2 for name, values in experts[0].items()})
    out = load(tmp_path / "out", dtype=torch.float64).eval()
    assert divergence(folder, out) < 0.9 * divergence(folder, start)
    changed = {name for name, values in out.state_dict().items() if not torch.equal(values, start.state_dict()[name])}
    assert ("model.embed_tokens.weight" in changed) == (kind != "lora")
    assert "model.layers.0.mlp.up_proj.weight" in changed
    if kind == "samerging":
        check_span(folder, out)


def test_all_weights_are_trained_from_the_model_that_is_named(
    folder: Path, tmp_path: Path, scripts: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, control = scripts
    start = folder / "experts" / "math"
    given = [f"{folder / 'experts' / name}={folder / f'{name}.calibration.jsonl'}" for name in DOMAINS]
    options = ["--base", str(folder / "base"), "--prompts", "16", "--calibration", *given, "--start", str(start)]
    options += ["--steps", "1", "--learning-rate", "1e-4", "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["control", "all", *options])
    control.main()
    began, ended = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (start, tmp_path / "out"))
    assert any(not torch.equal(began[name], ended[name]) for name in began)
    for name, values in began.items():  # a step of Adam is as long as the learning rate; the rest is rounding
        torch.testing.assert_close(ended[name].float(), values.float(), rtol=2**-8, atol=1.1e-4)
    monkeypatch.setattr(sys, "argv", ["control", "lora", *options])
    with pytest.raises(SystemExit):
        control.parse_args()


def check_span(folder: Path, out: Any) -> None:
    """Check that every tensor is the base plus a sum of the experts' updates, by one number for each."""
    load = AutoModelForCausalLM.from_pretrained
    base = load(folder / "base", dtype=torch.float64).state_dict()
    experts = [load(folder / "experts" / name, dtype=torch.float64).state_dict() for name in DOMAINS]
    for name, values in out.state_dict().items():
        updates = torch.stack([(expert[name] - base[name]).flatten() for expert in experts], dim=1)
        target = (values - base[name]).flatten()[:, None]
        found = torch.linalg.lstsq(updates, target).solution
        # The merge that training starts from and what comes of it are rounded to bfloat16. Least squares makes the
        # norm of what is left no larger than that of both errors; a single element of it may be.
        assert float((updates @ found - target).norm()) <= 2 * 2**-9 * float(values.norm()), name


def test_what_is_lowered_instead_of_the_divergence(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, control = scripts
    torch.manual_seed(0)
    merged, expert = torch.randn(3, 7), torch.randn(3, 7)
    q, p = (scipy.special.softmax(values.double().numpy() / 2, axis=1) for values in (merged, expert))
    pair = [Outputs(values, is_logits=True) for values in (merged, expert)]
    np.testing.assert_allclose(control.softened_kl(*pair), scipy.stats.entropy(p, q, axis=1), rtol=1e-4)
    q = scipy.special.softmax(merged.double().numpy(), axis=1)
    np.testing.assert_allclose(control.entropy(*pair), scipy.stats.entropy(q, axis=1), rtol=1e-4)


def test_random_directions_are_as_long_as_the_updates_they_stand_for(
    folder: Path, tmp_path: Path, scripts: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, control = scripts
    given = [f"{folder / 'experts' / name}={folder / f'{name}.calibration.jsonl'}" for name in DOMAINS]
    options = ["--base", str(folder / "base"), "--prompts", "16", "--calibration", *given]
    monkeypatch.setattr(sys, "argv", ["control", "random", *options, "--output-dir", str(tmp_path / "out")])
    state = control.run_experts(control.parse_args()).state
    random = control.RandomDirections(state, seed=1)
    load = AutoModelForCausalLM.from_pretrained
    base, math = (load(path, dtype=torch.float32).state_dict() for path in (folder / "base", folder / "experts/math"))
    name = "model.layers.0.mlp.up_proj.weight"
    update, found = math[name] - base[name], random.expert(0, name) - base[name]
    torch.testing.assert_close(found.norm(), update.norm(), rtol=1e-4, atol=0)
    assert abs(torch.cosine_similarity(found.flatten(), update.flatten(), dim=0)) < 0.1
    assert torch.equal(random.expert(0, name), random.expert(0, name))
    other = random.expert(1, name) - base[name]
    assert abs(torch.cosine_similarity(found.flatten(), other.flatten(), dim=0)) < 0.1
    assert random.factors(0, name) is None
    head = "model.embed_tokens.weight"  # predictions of the experts are made of it
    assert torch.equal(random.expert(0, head), math[head])
