"""Texts that a merge goes on with, and what it learns on them, against naive passes of transformers' whole models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import MambaConfig, MambaForCausalLM

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.refinement import rollouts
from hf_frmerge.calibration.refinement.corrected_merge import CorrectedMerge, read_start
from hf_frmerge.calibration.refinement.expert_updates import ExpertUpdates
from hf_frmerge.calibration.refinement.losses import row_losses
from hf_frmerge.calibration.refinement.refine import Refinement, RefineOptions
from hf_frmerge.calibration.refinement.rollouts import check_writes, is_on_policy, write_rollouts
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.record.manifest import read_manifest
from tests.refinement_models import (
    MODELS,
    N_EXPERTS,
    assert_loss_and_gradients,
    expert_weights,
    merger,
    padded,
    some_corrections,
    swept,
)


@pytest.mark.parametrize("lmbda", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_the_share_of_steps_is_what_was_asked_for(lmbda: float) -> None:
    for first in (0, 10, 20):
        taken = [is_on_policy(step, lmbda) for step in range(first, first + 10)]
        assert sum(taken) == round(10 * lmbda)


@pytest.mark.parametrize(("kind", "form"), [("llama", "dense"), ("tied", "low_rank"), ("gpt2", "table")])
def test_the_merge_goes_on_from_the_first_half_by_its_own_predictions(
    models: Path, kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "BATCH", 3)  # what is written together is no part of the outcome
    sweep = swept(models, kind)
    merge = CorrectedMerge(
        sweep.state, read_start(sweep.state), some_corrections(sweep, form), ExpertUpdates(sweep.state)
    )
    texts = {(0, 4): [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5]], (1, 4): [[3, 1, 4, 1]], (1, 6): [[2, 7]] * 2}
    begun = {place: padded(rows) for place, rows in texts.items()}
    begun[1, 4].pop("attention_mask")  # as where prompts are of one length
    written = write_rollouts(merge, begun, seed=11)
    weights = {name: merge.weight(name).double() for name in read_start(sweep.state)}
    model = MODELS[kind][0].from_pretrained(models / kind / "base", dtype=torch.float64).eval()
    for place, n_given, length in (((0, 4), 2, 8), ((1, 4), 2, 4), ((1, 6), 1, 2)):
        assert written[place].n_given == n_given
        for row, text in enumerate(texts[place]):
            expected = text[:n_given]
            for u in np.random.default_rng([11, *place, row]).random(length - n_given):
                with torch.no_grad():
                    logits = functional_call(model, weights, (torch.tensor([expected]),)).logits[0, -1]
                expected.append(int((torch.softmax(logits, -1).cumsum(-1) <= u).sum()))
            assert written[place].ids_BT[row].tolist() == expected


def test_loss_and_gradient_are_those_of_the_whole_models_on_the_written_tokens(models: Path) -> None:
    """Reverse KL; all that was written of an expert's prompts counts as much as these do."""
    sweep = swept(models, "llama")
    start, corrections = read_start(sweep.state), some_corrections(sweep, "dense")
    n_steps = 3  # as many as there are batches: one of each expert takes part in a step
    options = RefineOptions(n_steps, partial(row_losses, loss="reverse_kl"), 1e-3, 1000, seed=5, lmbda=1.0)
    refinement = Refinement(sweep, start, corrections, options)
    refinement.begin_round(0)
    value = sum(refinement.take_gradients(step) for step in range(n_steps)) / n_steps

    leaves = {name: values.double().requires_grad_() for name, values in corrections.items()}
    weights = {name: values.double() + leaves.get(name, 0) for name, values in start.items()}
    model = MODELS["llama"][0].from_pretrained(models / "llama/base", dtype=torch.float64).eval()
    merge = CorrectedMerge(sweep.state, start, corrections, ExpertUpdates(sweep.state))
    total = torch.zeros((), dtype=torch.float64)
    for number, share in enumerate((0.25, 0.75)):
        expert = expert_weights(models, "llama", "full", number)
        batches = [b for b in sweep.state.batches if b.expert == number and not b.is_held_out]
        order = np.random.default_rng([5, number, 0]).permutation(len(batches))
        n_tokens = sum(batch.n_tokens for batch in batches)
        for step, place in enumerate(order):
            written = write_rollouts(merge, {(number, step): batches[place].inputs}, seed=5)[number, step]

            def predict(of: dict[str, Tensor], ids: Tensor = written.ids_BT, first: int = written.n_given - 1) -> Any:
                return torch.log_softmax(functional_call(model, of, (ids,)).logits[:, first:], -1)

            q, p = predict(weights), predict(expert)
            divergence = (q.exp() * (q - p)).sum(-1)
            total = total + share * batches[place].n_tokens / n_tokens * divergence.mean()
    assert_loss_and_gradients(refinement, value, n_steps, total, leaves)


def test_each_round_is_written_by_the_merge_as_it_is_then(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Every tenth step anew, for the steps whose turn it is; the others take the prompts."""
    asked: list[list[tuple[int, int]]] = []
    weights: list[Tensor] = []
    write = write_rollouts

    def watched(merge: CorrectedMerge, begun: Any, seed: int) -> Any:
        asked.append(list(begun))
        weights.append(merge.weight("lm_head.weight").detach().clone())
        return write(merge, begun, seed)

    monkeypatch.setattr("hf_frmerge.calibration.refinement.refine.write_rollouts", watched)
    sweep = swept(models, "llama")
    options = RefineOptions(14, partial(row_losses, loss="reverse_kl"), 1e-3, 4, seed=5, lmbda=0.25)
    refinement = Refinement(sweep, read_start(sweep.state), some_corrections(sweep, "dense"), options)
    refinement.run(tmp_path / "progress", silent=True)
    assert asked == [[(e, s) for s in steps for e in range(N_EXPERTS)] for steps in ((3, 7), (11,))]
    assert not torch.equal(*weights)


# ---- what cannot write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classifier", "headless"])
def test_what_writes_no_text_is_refused_before_anything_is_done(models: Path, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"refine_steps": 2, "refine_learning_rate": 1e-3}
    for option, value, writer in (("refine_lmbda", 0.5, "the merge"), ("refine_written_samples", 4, "the experts")):
        refused = rf"Bert\w+ does not write text, as {option} .* {writer} do.* Leave it out"
        with pytest.raises(ArgumentError, match=refused):
            merger(models, tmp_path / "out", kind, **{option: value}, **options).merge()
    assert not (tmp_path / "out").exists()
    merger(models, tmp_path / "out", kind, **options).merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.refinement is not None


def test_a_model_that_remembers_in_another_way_is_refused() -> None:
    config = MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = BlockwiseModel(MambaForCausalLM, config, torch.device("cpu"), torch.float32)
    with pytest.raises(ArgumentError, match=r"MambaForCausalLM keeps no past_key_values.* leave out refine_lmbda"):
        check_writes(model, "refine_lmbda", "the merge")


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_writes_passes(kind: str, dtype: torch.dtype) -> None:
    check_writes(BlockwiseModel(*MODELS[kind], torch.device("cpu"), dtype), "refine_lmbda", "the merge")


@pytest.mark.parametrize("lmbda", [-0.1, 1.5])
def test_a_share_is_between_0_and_1(models: Path, tmp_path: Path, lmbda: float) -> None:
    with pytest.raises(ArgumentError, match=r"`refine_lmbda` must be from 0 to 1 \(share of the steps\)"):
        merger(models, tmp_path, refine_lmbda=lmbda)
