"""
Time spectral methods on the matrices of real fine-tunes, beside the bare SVDs that they are made of, in float32.

    python scripts/bench_spectral.py BASE EXPERT EXPERT EXPERT --layers 3 20

For every method the matrices of these layers are merged in memory, on one thread; set beside it is what LAPACK takes
in float32 for the SVDs of the formula, on matrices of the same shapes with the values of the experts. The best of
`--repeats` rounds counts, in CPU seconds, which other programs disturb less than they do the clock.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from scipy.linalg import svd
from threadpoolctl import threadpool_limits

from hf_frmerge.methods.spectral.decision import Spectral
from hf_frmerge.methods.spectral.inputs import Experts, SpectralOptions
from hf_frmerge.methods.table import METHODS

Matrix = NDArray[np.float32]


def joined(deltas: Matrix) -> list[Matrix]:
    """Return matrices like the left and the right vectors that are made orthonormal."""
    rank = min(deltas.shape[1:]) // len(deltas)
    columns = np.concatenate([delta[:, :rank] for delta in deltas], axis=1)
    return [columns, np.concatenate([delta[:rank] for delta in deltas])]


# Method -> the matrices whose SVDs its formula asks for.
BARE: dict[str, Callable[[Matrix], list[Matrix]]] = {
    "tsv_m": lambda deltas: [*deltas, *joined(deltas)],
    "iso_c": lambda deltas: [deltas.sum(axis=0)],
    "iso_cts": lambda deltas: [deltas.sum(axis=0), *deltas, *joined(deltas)],
    "knots": lambda deltas: [np.concatenate(list(deltas), axis=1)],
    "dc_merge": lambda deltas: [*deltas, *joined(deltas)],
    "res_merge": list,
}


def matrices(base: Path, experts: Sequence[Path], layers: Sequence[int]) -> Iterator[tuple[Matrix, Matrix]]:
    """Yield the matrices of these layers: the experts' deltas, and the base model's."""
    files = [safe_open(str(folder / "model.safetensors"), "pt") for folder in (base, *experts)]
    for name in files[0].keys():  # noqa: SIM118 - it cannot be iterated over
        if any(f".layers.{layer}." in name for layer in layers) and len(files[0].get_slice(name).get_shape()) == 2:
            origin, *tuned = (file.get_tensor(name).float().numpy() for file in files)
            yield np.stack([each - origin for each in tuned]), origin


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder of the base model, in one file")
    parser.add_argument("experts", type=Path, nargs="+", help="folders of full fine-tunes, each in one file")
    parser.add_argument("--layers", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", choices=BARE, nargs="+", default=list(BARE))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    weights = (1 / len(options.experts),) * len(options.experts)
    inputs = list(matrices(options.base, options.experts, options.layers))
    print(f"{len(inputs)} matrices of {len(weights)} experts\n")
    print("| method | SVDs a matrix | alone, float32, CPU s | the method, CPU s | ratio |\n|---|---:|---:|---:|---:|")
    with threadpool_limits(1, user_api="blas"):
        for name in options.methods:
            density = METHODS[name].density
            decision = Spectral(name, weights, 1.0, SpectralOptions(1.0 if density is None else density))
            bare = [matrix for deltas, _ in inputs for matrix in BARE[name](deltas)]
            alone = sum(cpu_seconds(partial(svd, matrix, full_matrices=False), options.repeats) for matrix in bare)
            ours = sum(
                cpu_seconds(partial(decision.merge, Experts(deltas, base)), options.repeats) for deltas, base in inputs
            )
            print(f"| {name} | {len(bare) // len(inputs)} | {alone:.2f} | {ours:.2f} | {ours / alone:.2f} |")


if __name__ == "__main__":
    main()
