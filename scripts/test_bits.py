"""
Show that coefficients have the same bits whatever the BLAS, the SIMD level of numpy and the kernels.

    python scripts/test_bits.py

Every setting of this machine's processor solves the same blocks in a process of its own: with OpenBLAS held to older
processors, with numpy's newer instructions turned off, with the kernels of each instruction set and with none. The
digests of all numbers must be those of the default setting, and the tests of geometry, methods and kernels must pass
in a few settings that together hold each of them. About a minute on two cores.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from hf_frmerge.checkpoints.adapters.factors import DoraWeight
from hf_frmerge.geometry.lowrank import Factors, base_gram, concatenate, factor_gram
from hf_frmerge.kernels.product import product
from hf_frmerge.merging.engine.solve import points_of, solve
from hf_frmerge.methods.span import SpanOptions
from hf_frmerge.methods.table import METHODS

ROOT = Path(__file__).resolve().parents[1]
TESTED = ["tests/geometry", "tests/methods", "tests/kernels"]
# How Python marks what cannot be imported: as where the extension was not built.
WITHOUT_EXTENSION = "import sys; sys.modules['hf_frmerge.kernels._native'] = None; "
NONE = "none"
BUILT = "tests/kernels/test_loading.py::test_the_cpu_gets_the_native_kernels_at_their_best_level"


def settings() -> list[dict[str, str]]:
    """Return the variables of every setting, one changed at a time, the default first."""
    found: list[dict[str, str]] = [{}]
    for name, feature in (("SkylakeX", "AVX512_SKX"), ("Haswell", "AVX2"), ("Sandybridge", "AVX")):
        if __cpu_features__.get(feature):
            found.append({"OPENBLAS_CORETYPE": name})
    here = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    widest = [name for name in here if name.startswith(("AVX512", "X86_V4"))]
    found += [{"NPY_DISABLE_CPU_FEATURES": " ".join(names)} for names in (widest, here) if names]
    try:
        from hf_frmerge.kernels import _native
    except ImportError:
        return found
    return found + [{"HF_FRMERGE_ISA": level} for level in [*_native.levels(), NONE]]


def combined(alone: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return settings of several variables that together hold every one of `alone`."""
    values: dict[str, list[str]] = {}
    for setting in alone:
        for name, value in setting.items():
            values.setdefault(name, []).append(value)
    most = max(map(len, values.values()), default=0)
    return [{name: found[min(i, len(found) - 1)] for name, found in values.items()} for i in range(most)]


def run(setting: dict[str, str], code: str) -> str:
    """Run Python code in a setting and return what it printed; raises with its output if it failed."""
    variables = {name: value for name, value in setting.items() if value != NONE}
    code = (WITHOUT_EXTENSION if NONE in setting.values() else "import sys; ") + code
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"Failed in the setting {setting}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def run_tests(setting: dict[str, str]) -> str:
    """Run the tests in a setting and return what pytest printed."""
    options = ["-q", "-p", "no:cacheprovider", *TESTED]
    if NONE in setting.values():
        options.append(f"--deselect={BUILT}")
    return run(setting, f"import pytest; sys.exit(pytest.main({options}))")


def main() -> None:
    """Compare the digests of all settings, then run the tests in a few."""
    alone = settings()
    with ThreadPoolExecutor(2) as pool:
        digests = list(
            pool.map(lambda s: run(s, "sys.path.insert(0, 'scripts'); import test_bits as t; t.digest()"), alone)
        )
        for setting, digest in zip(alone, digests):
            print(digest, setting or "default")
        if len(set(digests)) > 1:
            raise SystemExit("The digests differ: coefficients depend on the machine.")
        together = combined(alone)
        for setting, output in zip(together, pool.map(run_tests, together)):
            print(output.splitlines()[-1], setting)


def digest() -> None:
    """Print one digest of coefficients, geometry, Gram matrices of factors and rows of low-rank weights."""
    digests = {name: found.hexdigest()[:12] for name, found in _numbers().items()}
    print(" ".join(f"{name} {found}" for name, found in digests.items()))


def _numbers() -> dict[str, hashlib._Hash]:
    rng = np.random.default_rng(0)
    solved, factored = hashlib.sha256(), hashlib.sha256()
    for method, only in ((method.name, method.n_experts) for method in METHODS.values() if method.kind == "span"):
        for n in (2, 3, 8, 17) if only is None else (only,):
            for spread in (1e-4, 0.1, 1.0, 3.0):
                points = points_of(_grams(rng, 2, 60, n, spread), "weights", has_base=False)
                options = SpanOptions(norm="median", beta=0.3, on_ambiguous="linear")
                for solution in solve(
                    points, rng.dirichlet(np.ones(n), 2), method, options, tensors=["a", "b"], experts=["x"] * n
                ):
                    solved.update(solution.coefficients.tobytes() + repr(solution.geometry).encode())
    factors = [
        Factors(rng.standard_normal((300, r)).astype(np.float32), rng.standard_normal((r, 200)), 1 / 3) for r in (4, 9)
    ]
    base = rng.standard_normal((300, 200))
    factored.update(factor_gram(factors, product).tobytes())
    factored.update(base_gram([base[:100], base[100:]], factors, product).tobytes())
    factored.update(concatenate(factors, np.array([0.3, 0.7])).B.tobytes())
    left, right = factors[0].B, factors[0].A.astype(np.float32)
    dora = DoraWeight(left, right, rng.uniform(1, 2, 300))
    factored.update(dora.rows(base.astype(np.float32), 0).tobytes() + product(left, right).tobytes())
    return {"solved": solved, "factored": factored}


def _grams(rng: np.random.Generator, tensors: int, blocks: int, n: int, spread: float) -> np.ndarray:
    """Difference Gram matrices with the same bits everywhere: whole numbers, of which sums are exact in any order."""
    common = rng.integers(-1000, 1000, (tensors, blocks, 1, 24))
    own = np.round(spread * rng.integers(-10000, 10000, (tensors, blocks, n, 24)) / 10).astype(np.int64)
    points = common + own
    points[..., 1:, :] -= points[..., :1, :]
    return (points @ points.swapaxes(-1, -2)).astype(np.float64)


if __name__ == "__main__":
    main()
