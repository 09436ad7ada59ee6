"""
Merge random matrices in float32 with this package and with FusionBench, and print how far apart the results are.

    pip install fusion-bench                     # in an environment of its own, beside this package
    python scripts/compare_fusion_bench.py

FusionBench (0.2.33 is what this was written for) is imported into the same process; its functions take tensors, so no
models are needed. Every row is a method on one kind of experts, with what has to be set for both to mean the same, or
why they cannot agree. The exit code is 1 if the two are farther apart than a tolerance where they should agree.
FusionBench has no SWUDI, ResMerge, OrthoMerge, DC-Merge and ACE-Merging; for these there is compare_authors_code.py.
"""

from __future__ import annotations

import sys

import torch
from agreement import Row, by_rule, print_table
from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.singular_value_calibration.utils import subspace_consistency_spectral_calibration
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from torch import Tensor

from hf_frmerge.calibration.baselines.regmean import shrunk
from hf_frmerge.calibration.fits.least_squares import FitOptions, System, fit_linear
from hf_frmerge.fisher.average import fisher_average
from hf_frmerge.methods.post_steps import SingularValueCalibration

N, ROWS, COLS, RANK = 3, 96, 60, 6
NAME = "layer.weight"


def main() -> int:
    """Print a table, and return 1 if two results differ that should not."""
    torch.manual_seed(0)
    full = 0.02 * torch.randn(N, ROWS, COLS)
    low = 0.02 * torch.randn(N, ROWS, RANK) @ torch.randn(N, RANK, COLS)
    rows = [*of_deltas("full rank", full), *of_deltas("rank 6", low), *by_data(full)]
    return int(print_table(rows) > 0)


def of_deltas(kind: str, deltas: Tensor) -> list[Row]:
    """Return the methods that look at deltas alone."""
    is_full = kind == "full rank"
    vectors = [{NAME: delta} for delta in deltas]
    base = torch.zeros(ROWS, COLS)
    total = deltas.sum(0)
    calibration = SingularValueCalibration((1 / N,) * N, 0.1)

    def knots() -> Tensor:
        left, values, rights = subspace_alignment(list(deltas))
        flat = torch.stack([right.reshape(-1) for right in rights])
        share = (int(0.2 * flat.shape[1]) - 0.5) / flat.shape[1]
        merged = ties_merging(flat, reset_thresh=share, merge_func="mean")
        return left * values @ merged.reshape(rights[0].shape)

    return [
        Row(
            "tsv_m",
            kind,
            lambda: compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")[NAME],
            by_rule("tsv_m", deltas),
            "same" if is_full else "theirs takes noise for directions that have no singular value, to fill 1/N",
            agree=is_full,
        ),
        Row(
            "iso_c",
            kind,
            lambda: iso_c(vectors, accelerator="cpu")[NAME],
            by_rule("iso_c", deltas),
            "same" if is_full else "theirs takes the mean over zeros too, and gives noise the same value",
            agree=is_full,
        ),
        Row(
            "iso_cts",
            kind,
            lambda: iso_cts(vectors, 0.8, accelerator="cpu")[NAME],
            by_rule("iso_cts", deltas),
            "same, density 0.8"
            if is_full
            else "as iso_c; the share of common directions is of all 60, not of rank 18",
            agree=is_full,
        ),
        Row(
            "knots",
            kind,
            knots,
            by_rule("knots", deltas),
            "their alignment, joined by their TIES, which keeps one element more than its share",
        ),
        Row(
            "svc",
            kind,
            lambda: subspace_consistency_spectral_calibration(base, list(deltas), total, 0.1, torch.device("cpu")),
            lambda: torch.from_numpy(calibration.apply(total.numpy(), deltas.numpy())),
            "alpha is svc_floor, 0.1; the merged delta is the sum",
        ),
    ]


def by_data(deltas: Tensor) -> list[Row]:
    """Return the methods that take statistics of data; these are random here."""
    weights = torch.randn(ROWS, COLS) + deltas
    grams = [inputs.T @ inputs for inputs in torch.randn(N, 400, COLS)]
    information = torch.rand(N, ROWS, COLS) ** 4
    norms = information.flatten(1).norm(dim=1)

    def regmean() -> Tensor:
        average, system = weights.mean(0), System.zeros(COLS, ROWS, torch.device("cpu"))
        for gram, weight in zip(grams, weights):
            system.gram_II += shrunk(gram, 0.9) / N
            system.pull_IO += shrunk(gram, 0.9) @ (weight - average).T / N
        solved = fit_linear(system, torch.zeros(ROWS, COLS), FitOptions(ridge=0.0), has_bias=False)
        return average + solved.weight_OI.float()

    def fisher() -> Tensor:
        return merging_with_fisher_weights(
            {NAME: list(weights)}, [{NAME: each} for each in information], torch.ones(N), minimal_fisher_weight=1e-9
        )[NAME]

    return [
        Row(
            "regmean",
            "random inputs",
            lambda: merging_with_regmean_weights(
                {NAME: list(weights)}, [{"layer": gram} for gram in grams], reduce_non_diagonal_ratio=0.9
            )[NAME],
            regmean,
            "off_diagonal 0.9; all experts have as many tokens, by which ours divides",
        ),
        Row(
            "fisher",
            "random information",
            fisher,
            lambda: fisher_average(list(weights), list(information / norms[:, None, None]), [1 / N] * N)[0],
            "theirs adds a number to each element (1e-9 here), ours has a floor of 0.001 of the mean",
            agree=False,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
