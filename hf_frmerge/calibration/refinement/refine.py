"""
Refine a fitted merge: a short distillation of all its layers together, to each expert on its own prompts.

The loss is the mean over the experts, by their weights, of the mean loss over the predictions of an expert's prompts;
every step takes some prompts of each. Adam, with a few steps of warm-up and a linear decay to zero. Of the points that
are judged on held-out prompts, the best is what comes out.

Some of the steps may take texts instead with which the merge itself goes on from prompts. These are written for all
steps up to the next judgement, from the state that was kept at the last: a run that goes on writes the same again.
"""

# Shape suffixes: B = prompts, T = tokens, H = hidden size.

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_frmerge.calibration.blocks.blockwise_model import Outputs, Weights
from hf_frmerge.calibration.blocks.outputs import outputs_of
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.held_out import Candidate, distances
from hf_frmerge.calibration.refinement.corrected_merge import CorrectedMerge, stored_dtype
from hf_frmerge.calibration.refinement.expert_updates import ExpertUpdates
from hf_frmerge.calibration.refinement.progress_file import Best, Progress, read_progress, write_progress
from hf_frmerge.calibration.refinement.rollouts import Place, is_on_policy, write_rollouts
from hf_frmerge.calibration.refinement.teachers import Teachers
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.merging.planning.corrections import mean_known

logger = logging.getLogger(__name__)

_WARM_UP = 5
_BETAS = (0.9, 0.99)
_JUDGED_EVERY = 10


@dataclass(frozen=True)
class RefineOptions:
    """
    Settings of a refinement.

    Attributes:
        steps: number of steps.
        loss: returns the loss of every row from the outputs of the merge and of an expert, as `row_losses` does.
        learning_rate: highest step size of Adam.
        batch_size: prompts a step, of all experts together, if they are of the greatest length; of shorter ones as
            many more as have no more tokens. At least one of every expert.
        seed: chooses the order of the prompts.
        rho: radius of a sharpness-aware step: gradients are taken that far uphill. 0: where the merge is.
        is_barycentre: learn from the barycentre of all experts' predictions, and not from a prompt's own expert.
        lmbda: share of the steps on texts that the merge goes on with itself.
    """

    steps: int
    loss: Callable[[Outputs, Outputs], Tensor]
    learning_rate: float
    batch_size: int
    seed: int
    rho: float = 0.0
    is_barycentre: bool = False
    lmbda: float = 0.0


@dataclass(frozen=True)
class Chunk:
    """
    Prompts of one expert that run together.

    Attributes:
        expert: index of the expert.
        inputs: as the model takes them.
        taught: teacher -> its hidden states `(B, T, H)` after the last block.
        factor: of the sum of their losses: all chunks of all experts, each `1 / (chunks of its expert)` times, add up
            to the loss.
        first: number of the first prediction of each prompt that counts.
    """

    expert: int
    inputs: Mapping[str, Tensor]
    taught: Mapping[int, Tensor]
    factor: float
    first: int = 0


class Refinement:
    """
    A refinement of a merge.

    Args:
        sweep: After its last block: it has the experts' hidden states of all prompts.
        start: The merge without data, by parameters, float32.
        corrections: What is added to it, to begin with; see `CorrectedMerge`. They are what is trained.
        options: Settings.
        written: Further prompts, which the sweep did not have.

    Attributes:
        values: the corrections as trained so far.
    """

    def __init__(
        self,
        sweep: Sweep,
        start: Weights,
        corrections: Weights,
        options: RefineOptions,
        written: Sequence[Batch] = (),
    ) -> None:
        self.values = {name: tensor.clone().requires_grad_() for name, tensor in corrections.items()}
        for tensor in self.values.values():  # of what no prompt reaches too, so that the optimiser has a state for all
            tensor.grad = torch.zeros_like(tensor)
        self._sweep, self._start, self._options = sweep, start, options
        self._updates = ExpertUpdates(sweep.state)
        self._merge = CorrectedMerge(sweep.state, start, self.values, self._updates)
        self._teachers = Teachers(sweep, is_barycentre=options.is_barycentre)
        fitted = [batch for batch in sweep.state.batches if not batch.is_held_out]
        self._longest = max(batch.inputs["input_ids"].shape[1] for batch in [*fitted, *written])
        self._chunks = self._cut(written)
        self._rollouts: dict[Place, Chunk] = {}

    def run(self, file: Path, *, silent: bool | None = None) -> Best | None:
        """
        Take all steps, from where an earlier run left off; return the best point that was judged.

        Args:
            file: Where the state is kept while it runs.
            silent: Show no progress bar; `None` shows it on a terminal.

        Returns:
            `None` if nothing finite came of it before a point was judged; this is said.
        """
        options = self._options
        optimizer = torch.optim.Adam(list(self.values.values()), options.learning_rate, _BETAS)
        done = read_progress(file, self._sweep.state.model.device)
        best = self._go_on(done, optimizer) if done is not None else None
        first = done.step if done is not None else 0
        steps = tqdm(
            range(first, options.steps), "Refining", options.steps, initial=first, unit="step", disable=silent
        )
        for step in steps:
            if step % _JUDGED_EVERY == 0:  # where every run begins, so that one that goes on writes the same
                self.begin_round(step)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * rate_at(step, options.steps)
            optimizer.zero_grad(set_to_none=False)
            steps.set_postfix(loss=f"{self.take_gradients(step):.4g}")
            if options.rho:
                self.take_gradients_uphill(step)
            optimizer.step()
            if (step + 1) % _JUDGED_EVERY and step + 1 < options.steps:
                continue
            point = self._judge(step + 1)
            if not math.isfinite(mean_known(point.distances)):
                logger.warning(
                    "The refinement ends at step %d, where the merge gives values that are not finite: what was best "
                    "so far is kept. A smaller refine_learning_rate (%g now) may help.",
                    step + 1, options.learning_rate,
                )  # fmt: skip
                break
            if best is None or mean_known(point.distances) < mean_known(best.distances):
                best = point
            write_progress(file, self._progress(step + 1, optimizer, best))
        return best

    def begin_round(self, first: int) -> None:
        """Let the merge as it is write what the steps until it is judged next need, and the teachers read that."""
        options = self._options
        steps = [
            s for s in range(first, first + _JUDGED_EVERY) if s < options.steps and is_on_policy(s, options.lmbda)
        ]
        begun = {(expert, step): self._chunk(expert, step) for step in steps for expert in self._chunks}
        self._rollouts = {}
        if not begun:
            return
        written = write_rollouts(self._merge, {place: chunk.inputs for place, chunk in begun.items()}, options.seed)
        batches = [Batch(expert, {"input_ids": written[expert, s].ids_BT}, is_held_out=False) for expert, s in begun]
        for (place, chunk), batch, taught in zip(begun.items(), batches, self._teachers.hidden(batches)):
            # The first prediction that counts is that of the first token that the merge wrote. All together count as
            # much as those of the prompts would.
            first_written = written[place].n_given - 1
            n_written = batch.inputs["input_ids"][:, first_written:].numel()
            factor = chunk.factor * self._n_predictions(chunk.inputs) / n_written
            self._rollouts[place] = Chunk(chunk.expert, batch.inputs, taught, factor, first_written)

    def take_gradients(self, step: int) -> float:
        """Add the gradients of a step's loss to the corrections; return the loss."""
        chunks = [self._rollouts.get((expert, step)) or self._chunk(expert, step) for expert in self._chunks]
        outer = self._merge.outer()
        hidden = self._merge.hidden(outer, [chunk.inputs for chunk in chunks])
        # Gradients are summed here over all prompts before they go on: the head's would else be converted for each.
        behind_blocks = self._sweep.state.model.behind_blocks(outer)
        leaves = [hidden_BTH.detach().requires_grad_() for hidden_BTH in hidden]
        outer_leaves = {n: value.detach().requires_grad_(value.requires_grad) for n, value in behind_blocks.items()}
        total = sum(self._backward_head(chunk, outer_leaves, leaf_BTH) for chunk, leaf_BTH in zip(chunks, leaves))
        ends = [*zip(hidden, leaves), *zip(behind_blocks.values(), outer_leaves.values())]
        trained = [(end, leaf.grad) for end, leaf in ends if end.requires_grad and leaf.grad is not None]
        if trained:
            torch.autograd.backward([end for end, _ in trained], [gradient for _, gradient in trained])
        return total

    def _chunk(self, expert: int, step: int) -> Chunk:
        """Return the prompts of an expert that take part in a step."""
        chunks = self._chunks[expert]
        turn, place = divmod(step, len(chunks))
        order = np.random.default_rng([self._options.seed, expert, turn]).permutation(len(chunks))
        return chunks[order[place]]

    def take_gradients_uphill(self, step: int) -> None:
        """
        Replace a step's gradients `g` by those at the corrections plus `rho * g / |g|` (Foret et al., 2010.01412).

        To first order the loss is largest there of all points that near, so that what is flat around it is preferred.
        """
        gradients = {name: tensor.grad for name, tensor in self.values.items() if tensor.grad is not None}
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        scale = self._options.rho / norm.clamp_min(torch.finfo(torch.float32).tiny)
        before = {name: tensor.detach().clone() for name, tensor in self.values.items()}
        with torch.no_grad():
            for name, gradient in gradients.items():
                self.values[name].add_(scale * gradient)
                gradient.zero_()
        self.take_gradients(step)
        with torch.no_grad():
            for name, tensor in self.values.items():
                tensor.copy_(before[name])

    def _backward_head(self, chunk: Chunk, outer: Weights, leaf_BTH: Tensor) -> float:
        """Add the gradients of the hidden states behind the blocks, and of weights there; return the loss."""
        model, total = self._sweep.state.model, 0.0
        # No more than the longest prompt at once: logits, and their gradients, would be the largest thing in memory.
        # Of a text that the merge wrote only the end counts, so it is taken by itself.
        for rows in _slices(chunk.inputs["input_ids"], 0 if chunk.first else self._longest):
            part = {name: values[rows] for name, values in chunk.inputs.items()}
            with torch.no_grad():
                taught = {teacher: hidden_BTH[rows] for teacher, hidden_BTH in chunk.taught.items()}
                target = self._teachers.outputs(taught, part)
            merged = outputs_of(model, outer, leaf_BTH[rows], part)
            loss = chunk.factor * self._options.loss(merged, target)[chunk.first :].sum()
            loss.backward()
            total += float(loss.detach())
        return total

    def _judge(self, step: int) -> Best:
        """Measure the corrections as they would be stored."""
        state = self._sweep.state
        stored = {
            name: tensor.detach().to(stored_dtype(state, name), copy=True) for name, tensor in self.values.items()
        }
        with torch.no_grad():
            merge = CorrectedMerge(state, self._start, stored, self._updates)
            outer = merge.outer()
            behind_blocks = state.model.behind_blocks(outer)
            held_out = {b: batch.inputs for b, batch in enumerate(state.batches) if batch.is_held_out}
            hidden = dict(zip(held_out, merge.hidden(outer, list(held_out.values()))))
            found = distances(self._sweep, {"refined": Candidate(behind_blocks, hidden)})["refined"]
        return Best(stored, found, step)

    def _progress(self, step: int, optimizer: torch.optim.Optimizer, best: Best) -> Progress:
        states = {name: optimizer.state[tensor] for name, tensor in self.values.items()}
        first, second = ({n: state[key] for n, state in states.items()} for key in ("exp_avg", "exp_avg_sq"))
        return Progress(step, self.values, first, second, best)

    def _go_on(self, done: Progress, optimizer: torch.optim.Optimizer) -> Best:
        with torch.no_grad():
            for name, tensor in self.values.items():
                tensor.copy_(done.values[name])
                optimizer.state[tensor] = {
                    "step": torch.tensor(float(done.step)),
                    "exp_avg": done.first[name],
                    "exp_avg_sq": done.second[name],
                }
        return done.best

    def _cut(self, written: Sequence[Batch]) -> dict[int, list[Chunk]]:
        """Cut the batches to fit, and those that were written, into parts that share a step; expert -> its parts."""
        state = self._sweep.state
        fitted = [b for b, batch in enumerate(state.batches) if not batch.is_held_out]
        given = [state.batches[b] for b in fitted]
        taught = self._teachers.hidden(given, own=[state.expert[b] for b in fitted]) + self._teachers.hidden(written)
        batches = [*given, *written]
        experts = sorted({batch.expert for batch in batches})
        n_tokens = max(1, self._options.batch_size // len(experts)) * self._longest
        share = sum(state.shares[expert] for expert in experts)
        by_expert: dict[int, list[Chunk]] = {}
        for expert in experts:
            parts = [
                (
                    {name: values[rows] for name, values in batch.inputs.items()},
                    {t: h[rows] for t, h in hidden.items()},
                )
                for batch, hidden in zip(batches, taught)
                if batch.expert == expert
                for rows in _slices(batch.inputs["input_ids"], n_tokens)
            ]
            predictions = sum(self._n_predictions(inputs) for inputs, _ in parts)
            factor = state.shares[expert] / share * len(parts) / predictions
            by_expert[expert] = [Chunk(expert, inputs, hidden, factor) for inputs, hidden in parts]
        return by_expert

    def _n_predictions(self, inputs: Mapping[str, Tensor]) -> int:
        if not self._sweep.predicts_tokens:
            return len(inputs["input_ids"])
        return int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()


def rate_at(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step, from 0: it rises for some steps, and falls linearly to zero."""
    return min((step + 1) / _WARM_UP, (steps - step) / max(1, steps - _WARM_UP), 1.0)


def _slices(ids_BT: Tensor, n_tokens: int) -> list[slice]:
    """Cut the rows of a batch into runs of about as many tokens."""
    size = max(1, n_tokens // ids_BT.shape[1])
    return [slice(start, start + size) for start in range(0, len(ids_BT), size)]
