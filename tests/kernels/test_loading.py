"""Which kernels are chosen, and that a wrong call is refused before a byte is touched."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest

from hf_frmerge.errors import ArgumentError
from hf_frmerge.kernels.interface import Operand
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.kernels.torch_backend import TorchKernels


def zeros(n_bytes):
    return np.zeros(n_bytes, np.uint8)


def read_only(n_bytes):
    array = zeros(n_bytes)
    array.flags.writeable = False
    return array


GOOD = Operand(zeros(12), "BF16")  # six elements

BAD_OPERANDS = {
    "too short": Operand(zeros(10), "BF16"),
    "too long": Operand(zeros(14), "BF16"),
    "half an element": Operand(zeros(11), "BF16"),
    "empty": Operand(zeros(0), "BF16"),
    "dtype unknown": Operand(zeros(12), "I16"),
    "dtype in lower case": Operand(zeros(12), "bf16"),
    "dtype of another size": Operand(zeros(12), "F32"),
    "strided": Operand(zeros(24)[::2], "BF16"),
}


@pytest.mark.parametrize("why", BAD_OPERANDS)
def test_operands_that_do_not_fit_are_refused(kernels, why):
    with pytest.raises(ValueError):
        kernels.gram([GOOD, BAD_OPERANDS[why]], 2, 3)
    with pytest.raises(ValueError):
        kernels.combine([GOOD, BAD_OPERANDS[why]], np.ones((2, 2)), zeros(12), "BF16", 2, 3)


@pytest.mark.parametrize(("n_blocks", "block_len"), [(-1, -6), (3, 3), (1, 5), (2**62, 2**62), (2**61, 8), (2**63, 1)])
def test_shapes_that_do_not_fit_are_refused(kernels, n_blocks, block_len):
    error = (ValueError, OverflowError, MemoryError)
    with pytest.raises(error):
        kernels.gram([GOOD], n_blocks, block_len)
    with pytest.raises(error):
        kernels.combine([GOOD], np.ones((2, 1)), zeros(12), "BF16", n_blocks, block_len)


@pytest.mark.parametrize(
    ("coefficients", "out", "out_dtype"),
    [
        (np.ones((2, 2)), zeros(12), "BF16"),
        (np.ones((3, 1)), zeros(12), "BF16"),
        (np.ones(2), zeros(12), "BF16"),
        (np.ones((2, 1)), zeros(11), "BF16"),
        (np.ones((2, 1)), zeros(24), "BF16"),
        (np.ones((2, 1)), zeros(12), "F32"),
        (np.ones((2, 1)), zeros(12), "U8"),
        (np.ones((2, 1)), read_only(12), "BF16"),
        (np.ones((2, 1)), zeros(24)[::2], "BF16"),
    ],
)
def test_coefficients_and_outputs_that_do_not_fit_are_refused(kernels, coefficients, out, out_dtype):
    with pytest.raises(ValueError):
        kernels.combine([GOOD], coefficients, out, out_dtype, 2, 3)


def test_no_operands_and_half_elements_are_refused(kernels):
    with pytest.raises(ValueError):
        kernels.gram([], 2, 3)
    with pytest.raises(ValueError):
        kernels.count_nonfinite(Operand(zeros(11), "BF16"))
    with pytest.raises(ValueError):
        kernels.count_nonfinite(Operand(zeros(12), "I8"))


@pytest.mark.skipif(shutil.which("cc") is None, reason="the extension is optional where there is no compiler")
def test_the_cpu_gets_the_native_kernels_at_their_best_level(caplog, monkeypatch):
    from hf_frmerge.kernels import _native

    monkeypatch.delenv("HF_FRMERGE_ISA", raising=False)
    with caplog.at_level(logging.INFO, logger="hf_frmerge.kernels"):
        kernels = load_kernels()
    assert kernels.name == f"native {_native.levels()[0]}"
    assert [record.message for record in caplog.records] == [f"Kernels: {kernels.name}."]
    for level in _native.levels():
        monkeypatch.setenv("HF_FRMERGE_ISA", level)
        assert load_kernels().name == f"native {level}"
    monkeypatch.setenv("HF_FRMERGE_ISA", "mmx")
    with pytest.raises(ArgumentError, match=r"plain.*'mmx'"):
        load_kernels()


def test_without_the_extension_the_cpu_gets_torch(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "hf_frmerge.kernels._native", None)  # how Python marks what cannot be imported
    monkeypatch.delitem(sys.modules, "hf_frmerge.kernels.native", raising=False)
    monkeypatch.delattr("hf_frmerge.kernels._native", raising=False)
    with caplog.at_level(logging.INFO, logger="hf_frmerge.kernels"):
        assert isinstance(load_kernels(), TorchKernels)
    assert "not built" in caplog.text and "Kernels: torch cpu." in caplog.text


@pytest.mark.parametrize("device", ["meta", "mps", "cuda:99", "abacus"])
def test_a_device_without_float64_or_absent_is_refused(device):
    with pytest.raises(ArgumentError, match=device):
        load_kernels(device)


@pytest.mark.skipif(shutil.which("cc") is None, reason="the extension is optional where there is no compiler")
def test_the_native_kernels_do_not_import_torch():
    code = "import sys, hf_frmerge.kernels.load as k; print(k.load_kernels().name, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("native ") and run.stdout.split()[-1] == "False"
