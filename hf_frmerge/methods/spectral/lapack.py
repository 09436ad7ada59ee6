"""
Singular vectors and eigenvectors of float32 matrices, computed in float32.

NumPy goes by way of float64, which takes about twice as long, and the functions of scipy.linalg keep other threads
waiting. So LAPACK is called where scipy offers it to compiled code (`scipy.linalg.cython_lapack`); ctypes lets go of
Python's lock for the time of a call.

LAPACK stores columns one after the other. A matrix with its rows one after the other is its transpose there, whose
left and right singular vectors change places: nothing needs to be copied into another order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.inputs import Matrix

_LARGEST_INT = 2**31 - 1
_N_ARGUMENTS = {"sgesdd": 14, "ssyevd": 11}

Argument = bytes | int | NDArray[Any]


def svd(matrix_mn: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """
    Return left singular vectors `(m, r)`, singular values `(r,)`, the largest first, and right ones `(r, n)`.

    Raises:
        np.linalg.LinAlgError: If LAPACK gives up, or a number is not finite.
    """
    m, n = matrix_mn.shape
    r = min(m, n)
    n_work = 4 * r * r + 7 * r + max(m, n)
    if not r or n_work > _LARGEST_INT:  # more than 23,000 rows and columns
        return np.linalg.svd(matrix_mn, full_matrices=False)
    left_mr, values_r, right_rn = np.empty((m, r), np.float32), np.empty(r, np.float32), np.empty((r, n), np.float32)
    work, integers = np.empty(n_work, np.float32), np.empty(8 * r, np.intc)
    own = _finite_copy(matrix_mn)
    _call("sgesdd", b"S", n, m, own, n, values_r, right_rn, n, left_mr, r, work, n_work, integers)
    return left_mr, values_r, right_rn


def eigh(matrix_nn: Matrix) -> tuple[Matrix, Matrix]:
    """
    Return the eigenvalues `(n,)` of a symmetric matrix, the smallest first, and its eigenvectors as columns.

    Raises:
        np.linalg.LinAlgError: If LAPACK gives up, or a number is not finite.
    """
    n = len(matrix_nn)
    n_work, n_integers = 2 * n * n + 6 * n + 1, 5 * n + 3
    if not n or n_work > _LARGEST_INT:
        return np.linalg.eigh(matrix_nn)
    values_n, work, integers = np.empty(n, np.float32), np.empty(n_work, np.float32), np.empty(n_integers, np.intc)
    vectors_nn = _finite_copy(matrix_nn)  # in rows
    _call("ssyevd", b"V", b"L", n, vectors_nn, n, values_n, work, n_work, integers, n_integers)
    return values_n, vectors_nn.T


def load() -> None:
    """Load the library, which brings a BLAS of its own, before threads are limited: that holds for what is there."""
    _routine("sgesdd")


def _finite_copy(matrix: Matrix) -> Matrix:
    """Return a copy for LAPACK to overwrite, its rows one after the other."""
    own: Matrix = np.array(matrix, np.float32, order="C")
    if not np.isfinite(own).all():
        raise np.linalg.LinAlgError("numbers are not finite")
    return own


def _call(name: str, *arguments: Argument) -> None:
    """Call a routine of LAPACK. Its last argument, which is not among these, tells whether it worked."""
    info = ctypes.c_int()
    _routine(name)(*map(_pointer, arguments), ctypes.addressof(info))
    if info.value:
        raise np.linalg.LinAlgError(f"LAPACK's {name} ended with {info.value}")


def _pointer(argument: Argument) -> Any:
    if isinstance(argument, bytes):
        return argument
    return argument.ctypes.data if isinstance(argument, np.ndarray) else ctypes.byref(ctypes.c_int(argument))


@cache
def _routine(name: str) -> Callable[..., None]:
    """Return a routine of LAPACK, all of whose arguments are pointers."""
    from scipy.linalg import cython_lapack  # a third of a second, which other merges do without

    capsule = cython_lapack.__pyx_capi__[name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer_of(capsule, name_of(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * _N_ARGUMENTS[name])(address)
