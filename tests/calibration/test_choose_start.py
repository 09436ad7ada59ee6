"""The start of a fit, chosen by the distance to the experts; and what the fit does to text of no expert."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click_runner import click_runner
from tiny_models import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.streams import in_batches
from hf_frmerge.calibration.choose_start import start_distances
from hf_frmerge.calibration.prompts.self_written import document_prefix, self_written_prompts
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.checkpoints.resolve import resolve_all
from hf_frmerge.cli.main import main
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.choose_method import CANDIDATES
from hf_frmerge.merging.planning.corrections import nearest_start
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.provenance.verify import verify

WORDS = [f"w{number}" for number in range(56)]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, and three fine-tunes of it, each to tokens of its own."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for number in range(3):
        torch.manual_seed(number + 1)
        expert = LlamaForCausalLM.from_pretrained(folder / "base")
        optimizer = torch.optim.Adam(expert.parameters(), 2e-3)
        for step in range(60):
            ids = torch.from_numpy(np.stack(prompts(number, 32, seed=step + 1)))
            optimizer.zero_grad()
            expert(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        expert.save_pretrained(folder / f"e{number}")
    return folder


def prompts(expert: int, count: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Walks over 20 tokens of an expert's own, each of which has one that follows it, but for some noise."""
    follows = np.random.default_rng(expert).permutation(20)
    rng = np.random.default_rng([seed, expert])
    walks = rng.integers(0, 20, (count, 12))
    for place in range(1, 12):
        walks[:, place] = np.where(rng.random(count) < 0.8, follows[walks[:, place - 1]], walks[:, place])
    return list(20 * expert + walks)


def merger(models: Path, out: Path, **options: Any) -> FisherRaoMerger:
    experts = [str(models / f"e{number}") for number in range(3)]
    defaults = {"method": "auto", "max_calibration_length": 12, "disable_tqdm": True, "calibration_rank": 4}
    args = MergingArguments(output_dir=str(out), **{**defaults, "num_calibration_samples": 64, **options})
    texts = {expert: [row.tolist() for row in prompts(number)] for number, expert in enumerate(experts)}
    return FisherRaoMerger(experts, args, base_model=str(models / "base"), calibration_dataset=texts)


def weights(folder: Path) -> Weights:
    return {n: v.double() for n, v in LlamaForCausalLM.from_pretrained(folder).state_dict().items()}


def averaged(base: Weights, experts: list[Weights], beta: float | None) -> Weights:
    """The mean delta of every tensor; with beta, of the norm that the experts' have, times their coherence ** beta."""
    merged = {}
    for name, origin in base.items():
        deltas = [expert[name] - origin for expert in experts]
        mean = sum(deltas) / len(deltas)
        if beta is not None:
            coherence = (sum(delta / delta.norm() for delta in deltas) / len(deltas)).norm()
            mean *= sum(delta.norm() for delta in deltas) / len(deltas) * coherence**beta / mean.norm()
        merged[name] = origin + mean
    return merged


def predictions(models: Path, values: Weights, ids: np.ndarray) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(models / "base").double().eval()
    model.load_state_dict(values)
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.softmax(-1)


def squared_distance(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((2 * torch.arccos((p * q).sqrt().sum(-1).clamp(max=1))).square().mean())


def test_distances_of_starts_are_those_of_whole_models_in_float64(models: Path) -> None:
    base, experts = weights(models / "base"), [weights(models / f"e{number}") for number in range(3)]
    merges = {
        "linear": averaged(base, experts, None),
        "nre beta=0.5": averaged(base, experts, 0.5),
        "nre": averaged(base, experts, 0.0),
    }
    specs = [str(models / f"e{number}") for number in range(3)]
    args = MergingArguments(method="auto", disable_tqdm=True)
    with closing(build_plan(specs, args, base_model=str(models / "base"))) as plan:
        config = LlamaConfig.from_pretrained(models / "base")
        model = BlockwiseModel(LlamaForCausalLM, config, torch.device("cpu"), torch.float32)
        batches = [
            batch
            for expert in (0, 2)  # one has no prompts
            for batch in in_batches(prompts(expert, 6), expert, 4, 0, is_held_out=True, device=model.device)
        ]
        found = start_distances(plan, model, batches)
    assert list(found) == [candidate.label for candidate in CANDIDATES]
    for label, merged in merges.items():
        assert found[label][1] is None
        for expert in (0, 2):
            ids = np.stack(prompts(expert, 6))
            expected = squared_distance(predictions(models, merged, ids), predictions(models, experts[expert], ids))
            assert found[label][expert] == pytest.approx(expected, rel=1e-4)


class Killed(Exception):
    pass


def test_the_nearest_start_is_recorded_and_a_resume_gives_the_same_bits(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole, fit = tmp_path / "out", tmp_path / "whole", Sweep.fit_block
    merger(models, whole).merge()
    manifest = read_manifest(whole)
    record = manifest.calibration
    assert record is not None and record.starts is not None
    chosen = nearest_start(record.starts)
    # What is measured for the start in the sweep, in the forms' units, is what it was chosen by.
    assert record.distances["start"] == pytest.approx(record.starts[chosen], rel=1e-6)
    assert record.mean_distance("start") == pytest.approx(
        min(sum(row) / 3 for row in record.starts.values()), rel=1e-6
    )
    candidate = next(candidate for candidate in CANDIDATES if candidate.label == chosen)
    assert (manifest.method, manifest.arguments["beta"], manifest.space) == (
        candidate.method,
        candidate.beta,
        "deltas",
    )
    assert verify(str(whole)).problems == []
    card = (whole / "README.md").read_text()
    assert f"It started from {chosen}, the nearest without data" in card and f"--method {candidate.method}" in card

    # Any of them by name gives the same fit.
    named = merger(models, tmp_path / "named", method=candidate.method, beta=candidate.beta, space="deltas")
    named.merge()
    for name in ("model.safetensors", "merge_corrections.safetensors"):
        assert (tmp_path / "named" / name).read_bytes() == (whole / name).read_bytes(), name

    def fit_block(self: Sweep, index: int, known: Any) -> Any:
        if index == 1 and known is None:
            raise Killed
        return fit(self, index, known)

    with monkeypatch.context() as patched:
        patched.setattr(Sweep, "fit_block", fit_block)
        with pytest.raises(Killed):
            merger(models, out).merge()
    merger(models, out).merge(resume_from_checkpoint=True)
    for name in ("model.safetensors", "merge_corrections.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert read_manifest(out).calibration == replace(record, seconds=read_manifest(out).calibration.seconds)
    result = click_runner().invoke(main, ["reproduce", str(out), "--output-dir", str(tmp_path / "again")])
    assert result.exit_code == 0, result.stderr


def test_text_of_no_expert_is_compared_with_the_base(models: Path, tmp_path: Path) -> None:
    merger(models, tmp_path / "out").merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.is_fitted and record.neutral is not None
    tokenizer = word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>")
    [written] = self_written_prompts(
        resolve_all([str(models / "base")]), None, prefix=document_prefix(tokenizer), leading=(), n_samples=8,
        max_length=12, seed=42,
    )  # fmt: skip
    ids = np.stack(written.token_ids)
    p, q = (predictions(models, weights(folder), ids) for folder in (models / "base", tmp_path / "out"))
    assert (record.neutral.prompts, record.neutral.tokens) == (8, ids.size)
    # The fit computes in bfloat16 where the processor has it.
    assert record.neutral.distance == pytest.approx(squared_distance(p, q), rel=0.05)
    assert record.neutral.nats == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=0.05)
    assert "On 8 prompts that the base wrote" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_writes_nothing_is_left_out(models: Path, tmp_path: Path) -> None:
    mute = merger(models, tmp_path / "out", method="linear")
    mute.processing_class = word_tokenizer(WORDS)  # no token begins a text
    mute.merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.neutral is None and record.starts is None
    assert "the base wrote" not in (tmp_path / "out" / "README.md").read_text()
