"""The compiled kernels; all else is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup

# Buffers came into the stable ABI with Python 3.11: one wheel serves 3.11 and every later one, and 3.10 gets its own.
STABLE_ABI = sys.version_info >= (3, 11)

setup(
    ext_modules=[
        Extension(
            "hf_frmerge.kernels._native",
            sources=["hf_frmerge/kernels/native.c"],
            depends=[path.as_posix() for path in Path("hf_frmerge/kernels").glob("native_*.h")],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE_ABI else [],
            # Contraction would change the bits of combine from machine to machine.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,  # without a compiler the package installs all the same and uses the torch kernels
            py_limited_api=STABLE_ABI,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
