"""Choice of the kernels for a device."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_frmerge.kernels.interface import Kernels

logger = logging.getLogger(__name__)


def load_kernels(device: str = "cpu") -> Kernels:
    """
    Load the fastest kernels for a device: on the CPU the native extension if it was built, otherwise torch.

    Args:
        device (`str`, *optional*, defaults to `"cpu"`):
            A torch device with float64, such as `"cpu"`, `"cuda:0"` or `"xpu"`.

    Raises:
        ArgumentError: If there is no such device here, or it has no float64 (`"mps"`).
    """
    kernels: Kernels
    # Backends are imported only when chosen: a CPU merge with the native kernels does not pay for importing torch.
    if device == "cpu":
        try:
            from hf_frmerge.kernels.native import NativeKernels

            kernels = NativeKernels()
        except ImportError as error:
            from hf_frmerge.kernels.torch_backend import TorchKernels

            logger.info("Native kernels were not built (%s): using torch, ten or more times slower.", error)
            kernels = TorchKernels(device)
    else:
        from hf_frmerge.kernels.torch_backend import TorchKernels

        kernels = TorchKernels(device)
    logger.info("Kernels: %s.", kernels.name)
    return kernels
