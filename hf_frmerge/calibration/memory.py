"""Give memory back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """
    Give the system back what was freed.

    glibc keeps freed tensors of up to 32 MB, such as the hidden states of a batch, in its heap: those that a fit no
    longer needs would lie beside what is allocated next. Where there is no glibc, nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
