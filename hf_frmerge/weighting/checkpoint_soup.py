"""Weights for checkpoints of one training run: their mean stands for a learning rate that decays."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.merging.arguments.named_weights import NamedWeights

STATE_FILE = "trainer_state.json"
"""Where `transformers.Trainer` keeps the step of a checkpoint."""

_NUMBER = re.compile(r"(\d+)[/\\]*(?:@[^/\\]*)?$")

# Share of the learning rate that is left after a share of the decay.
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "1-sqrt": lambda done: 1.0 - math.sqrt(done),
}


def checkpoint_step(spec: str) -> int:
    """
    Return the training step of a checkpoint, from its `trainer_state.json`, else from the number its name ends in.

    Args:
        spec: Expert as the user wrote it: a local folder such as `run/checkpoint-500`, or another model.

    Raises:
        CheckpointError: If the file is damaged.
        ArgumentError: If there is no file, and the name does not end in a number.
    """
    state = Path(spec).expanduser() / STATE_FILE
    if state.is_file():
        try:
            values = parse_json(state.read_bytes())
            return int(values["global_step"])
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise CheckpointError(
                f"{state} does not say at which step the checkpoint was written ({type(error).__name__}: {error}). "
                "Restore the file, or give the weights as numbers."
            ) from error
    number = _NUMBER.search(spec)
    if number is None:
        raise ArgumentError(
            f"Weights by step need checkpoints of a training run, but {spec!r} has no {STATE_FILE} and its name does "
            "not end in a step, as in checkpoint-500. Give the weights as numbers, one per expert."
        )
    return int(number.group(1))


def soup_weights(named: NamedWeights, experts: Sequence[str]) -> list[float]:
    """
    Return the weights of checkpoints, in the order given; the steps decide which is early and which late.

    Raises:
        ArgumentError: If an expert is no checkpoint, or two are of one step.
        CheckpointError: If a `trainer_state.json` is damaged.
    """
    if named.name == "uniform" or len(experts) == 1:
        return [1.0 / len(experts)] * len(experts)
    steps = [checkpoint_step(spec) for spec in experts]
    for position, step in enumerate(steps):
        if step in steps[:position]:
            raise ArgumentError(
                f"{experts[steps.index(step)]!r} and {experts[position]!r} are both of step {step}. Weights by step "
                "need different steps: leave one out, or give the weights as numbers."
            )
    return weights_by_step(named, steps)


def weights_by_step(named: NamedWeights, steps: Sequence[int]) -> list[float]:
    r"""
    Return weights that sum to 1 for checkpoints at different steps.

    With \(\theta_j\) the checkpoint at step \(s_j\), the mean \(\sum_j c_j\theta_j\) is the first one plus all later
    updates, those between \(\theta_{j-1}\) and \(\theta_j\) times \(d_j = \sum_{i \ge j} c_i\) (WSM, arXiv 2507.17634,
    theorem 3.1). So for updates that are damped as by a learning rate that decays from \(s_0\) on,

    \[ c_j = d_j - d_{j+1}, \quad d_j = d\Big(\frac{s_j - s_0}{s_k - s_0 + g}\Big), \quad d_0 = 1, d_{k+1} = 0, \]

    where the decay ends one mean gap \(g\) after the last checkpoint. `linear` has \(d(t) = 1 - t\), which for equal
    gaps are equal weights; `1-sqrt` has \(d(t) = 1 - \sqrt t\), the cooldown of arXiv 2405.18392. `ema` is an
    exponential moving average without its bias to the start, \(c_j \propto \mathrm{decay}^{(s_k - s_j)/g}\).

    Args:
        named: Shape.
        steps: Two or more, all different, in any order.
    """
    first, last = min(steps), max(steps)
    gap = (last - first) / (len(steps) - 1)
    if named.name == "ema":
        shares = [named.decay ** ((last - step) / gap) for step in steps]
        total = math.fsum(shares)
        return [share / total for share in shares]
    decay = _DECAYS[named.name]
    left = [decay((step - first) / (last - first + gap)) for step in sorted(steps)]
    damped = dict(zip(sorted(steps), (before - after for before, after in zip(left, [*left[1:], 0.0]))))
    return [damped[step] for step in steps]
