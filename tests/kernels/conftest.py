"""Every backend and instruction-set level this machine has, behind one fixture."""

from __future__ import annotations

import pytest

from hf_frmerge.kernels.interface import Kernels
from hf_frmerge.kernels.torch_backend import TorchKernels

try:
    from hf_frmerge.kernels.native import NativeKernels, _native

    LEVELS = _native.levels()
except ImportError:
    LEVELS = []

BACKENDS = [*(f"native {level}" for level in LEVELS), "torch cpu", "torch in small chunks"]


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    backend, _, level = request.param.partition(" ")
    if backend == "native":
        return NativeKernels(level)
    torch_kernels = TorchKernels("cpu")
    if level != "cpu":
        torch_kernels._chunk = 200  # many chunks, none of them whole, so that both buffers are used again and again
    return torch_kernels
