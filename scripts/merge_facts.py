"""What a benchmark says of a merged language model beside its losses, as `frmerge evaluate` measures it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_frmerge.evaluation.record import MERGED, EvaluationRecord

NEUTRAL = "neutral"
"""Name of the texts that belong to no expert."""


@dataclass(frozen=True)
class Facts:
    """
    How a merged model differs from its experts, and from the base where no expert is at home.

    Attributes:
        distance: mean over the experts of the squared Fisher-Rao distance to each on its own domain, rad².
        to_barycentre: mean over all domains of the distance to the barycentre of the experts' predictions, rad.
        variance: of the activations, over the mean of the experts', in the layer that lost most.
        neutral: nats a token more than the base on text of no domain; `None` without such text.
    """

    distance: float
    to_barycentre: float
    variance: float
    neutral: float | None

    def cells(self) -> str:
        """Return the columns of a row."""
        neutral = f"{self.neutral:+.3f}" if self.neutral is not None else ""
        return f"{self.distance:.3f} | {self.to_barycentre:.3f} | {100 * self.variance:.0f} % | {neutral}"


HEADINGS = ("rad² to experts", "rad to barycentre", "variance", "neutral, nats over base")


@dataclass(frozen=True)
class Texts:
    """
    Short texts that facts are measured on.

    Attributes:
        files: domain, or `NEUTRAL`, -> a file of text.
        experts: folders of the experts, each named like its domain.
        base: folder of the base model.
        block: tokens of a block.
    """

    files: Mapping[str, Path]
    experts: Sequence[Path]
    base: str
    block: int

    def measure(self, merged: Path) -> Facts:
        """Evaluate a merged model in another process; the experts are measured once, and kept in the cache."""
        options = [f"--data={domain}={file}" for domain, file in self.files.items()]
        options += [f"--experts={expert}" for expert in self.experts]
        command = [
            sys.executable, "-c", "from hf_frmerge.cli.main import main; main()", "evaluate", str(merged), *options,
            "--base-model", self.base, "--block-size", str(self.block), "--no-generate", "--json",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        return facts_of(EvaluationRecord.from_dict(json.loads(done.stdout)))


def facts_of(record: EvaluationRecord) -> Facts:
    """Return the facts of an evaluation whose experts are named like their domains."""
    own = [row.mean_squared for row in record.distances if row.model == MERGED and row.other == row.domain]
    gaps = [row.to_barycentre.mean for row in record.objectives if row.domain != NEUTRAL]
    variances = [row.activation_variance for row in record.collapse()]
    losses = {record.models[row.model]: row.metrics["loss"] for row in record.scores if row.domain == NEUTRAL}
    neutral = losses["merged"] - losses["base"] if losses else None
    return Facts(float(np.mean(own)), float(np.mean(gaps)), min(variances), neutral)
