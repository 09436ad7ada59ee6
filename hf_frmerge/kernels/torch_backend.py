"""
Kernels in torch: for accelerators, and for CPUs if the native extension was not built.

Each chunk is copied to one of two sets of host buffers (pinned, on an accelerator), from there to the device on a
separate stream, and used on the default stream. Copying the next chunk thus overlaps with computing on this one. The
CPU takes the same path, with torch's stand-ins for streams and events. This code has only been run on CPUs; neither
the overlap nor the speed on a GPU has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_frmerge.errors import ArgumentError
from hf_frmerge.kernels.elementwise import (
    Elementwise,
    RankedDropout,
    Run,
    Stream,
    add_energies,
    count_keys,
    merge_deltas,
)
from hf_frmerge.kernels.interface import ITEMSIZE, OVERFLOWS_AT, Combined, Operand, digest, digests_of

_PRECISION = {"BF16": (8, 2.0**-126), "F16": (11, 2.0**-14)}  # significant bits, smallest normal number
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Elements of one operand in a chunk. CPU: the size at which float64 products were fastest. Accelerator: 8 MiB of bf16,
# so that a copy takes much longer than launching the operations that use it.
_PART = 1 << 15  # elements that numpy works on at a time; a multiple of the runs in which squares are added
_CHUNK = {"cpu": 1 << 16, "accelerator": 1 << 22}


@dataclass(frozen=True)
class _Span:
    """Part of the operands: whole blocks `first..first + rows`, or elements `offset..offset + length` of one block."""

    first: int
    rows: int
    offset: int
    length: int


class TorchKernels:
    """
    Kernels on a torch device. Sums and products are always in float64, whatever `precise` says.

    Args:
        device (`str`):
            A torch device that has float64.

    Raises:
        ArgumentError: If there is no such device here, or it has no float64.
    """

    blocks_are_independent = False  # a product of many matrices may be taken in another order than that of one

    def __init__(self, device: str) -> None:
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device, dtype=torch.float64)
        except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
            # torch raises a different class for each way in which a device can be missing.
            raise ArgumentError(
                f"Expected a torch device of this machine that has float64, got {device!r}: {error}. "
                "Use device='cpu' instead; the passes are bound by reading, so little is lost."
            ) from error
        if self.device.type == "meta":
            raise ArgumentError("Expected a device that holds values, got 'meta'. Use device='cpu'.")
        self.name = f"torch {self.device}"
        self._module: Any = torch.get_device_module(self.device)
        self._chunk = _CHUNK["cpu" if self.device.type == "cpu" else "accelerator"]

    def gram(
        self, operands: Sequence[Operand], n_blocks: int, block_len: int, *, precise: bool = False
    ) -> NDArray[np.float64]:
        """Return the inner products of each block, as [`~kernels.Kernels.gram`] says."""
        _check(operands, n_blocks, block_len)
        gram = torch.zeros(n_blocks, len(operands), len(operands), dtype=torch.float64, device=self.device)
        for span, chunk in self._stream(operands, n_blocks, block_len):
            points = torch.stack([x.to(torch.float64) for x in chunk], dim=1)
            for i, operand in enumerate(operands):
                if i and not operand.is_delta:
                    points[:, i] -= points[:, 0]
            gram[span.first : span.first + span.rows] += points @ points.mT
        # `points @ points.mT` need not be exactly symmetric: BLAS may add up the two triangles in different orders.
        return (0.5 * (gram + gram.mT)).cpu().numpy()

    def gram_and_digests(
        self, operands: Sequence[Operand], n_blocks: int, block_len: int, *, precise: bool = False
    ) -> tuple[NDArray[np.float64], list[str]]:
        """Return Gram matrices and digests, as [`~kernels.Kernels.gram_and_digests`] says."""
        return self.gram(operands, n_blocks, block_len, precise=precise), digests_of(operands)

    def combine(
        self,
        operands: Sequence[Operand],
        coefficients: NDArray[np.float64],
        out: NDArray[np.uint8],
        out_dtype: str,
        n_blocks: int,
        block_len: int,
    ) -> Combined:
        """Write the linear combination of each block, as [`~kernels.Kernels.combine`] says."""
        _check(operands, n_blocks, block_len)
        if coefficients.shape != (n_blocks, len(operands)):
            raise ValueError(f"expected coefficients of shape {(n_blocks, len(operands))}, got {coefficients.shape}")
        _check_bytes(out, out_dtype, n_blocks * block_len, "out")
        if not out.flags.writeable:
            raise ValueError("out must be writable")
        table = torch.tensor(coefficients, dtype=torch.float64, device=self.device)
        is_finite = True
        for span, chunk in self._stream(operands, n_blocks, block_len):
            blocks = slice(span.first, span.first + span.rows)
            total = torch.full_like(chunk[0], -0.0, dtype=torch.float64)  # -0 + y is y for every y, also for -0
            for k, x in enumerate(chunk):
                # Two operations with a rounding each: a fused multiply-add would give other bits than the native code.
                term = x.to(torch.float64).mul_(table[blocks, k : k + 1])
                # Operands with coefficient 0 are skipped: adding 0 * x would turn -0 into +0, and infinity into NaN.
                if (coefficients[blocks, k] == 0).any():
                    term[table[blocks, k] == 0] = -0.0
                total.add_(term)
            if not coefficients[blocks].any(axis=1).all():
                total[(table[blocks] == 0).all(dim=1)] = 0.0
            is_finite = is_finite and bool((total.abs() < OVERFLOWS_AT[out_dtype]).all())  # False for NaN, too
            start = (span.first * block_len + span.offset) * ITEMSIZE[out_dtype]
            rounded = _round(total, out_dtype).reshape(-1).view(torch.uint8).cpu().numpy()
            out[start : start + rounded.size] = rounded
        return Combined(digest(out), is_finite)

    def count_nonfinite(self, operand: Operand) -> int:
        """Return how many values are NaN or infinite."""
        size = operand.data.size // ITEMSIZE.get(operand.dtype, 1)
        _check([operand], 1, size)
        return sum(int((~torch.isfinite(chunk[0])).sum()) for _, chunk in self._stream([operand], 1, size))

    # What decides about single elements is computed by numpy on the CPU, on a part at a time.

    def count_keys(
        self, operands: Sequence[Operand], stream: Stream, bins: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Count keys, as [`~kernels.Kernels.count_keys`] says."""
        parts = (count_keys(deltas_ND, stream, bins) for _, deltas_ND in _deltas(operands, _PART))
        return np.sum(list(parts), axis=0)

    def energies(self, operands: Sequence[Operand], threshold: float) -> NDArray[np.float64]:
        """Return sums of squares, as [`~kernels.Kernels.energies`] says."""
        total_N = np.zeros(len(operands) - 1)
        for _, deltas_ND in _deltas(operands, _PART):
            add_energies(total_N, deltas_ND, threshold)
        return total_N

    def merge_elements(
        self,
        operands: Sequence[Operand],
        decision: Elementwise,
        run: Run,
        skip: int,
        out: NDArray[np.uint8],
        out_dtype: str,
    ) -> tuple[Combined, bool]:
        """Write base and merged deltas, as [`~kernels.Kernels.merge_elements`] says."""
        is_ranked = isinstance(decision.keep, RankedDropout)
        size = run.row_len * max(1, _PART // run.row_len) if is_ranked else _PART
        merged, bounded, start = [], True, run.start
        for base_D, deltas_ND in _deltas(operands, size):
            bounded = bounded and bool(np.isfinite(deltas_ND).all())
            merged.append(merge_deltas(base_D, deltas_ND, decision, run._replace(start=start)))
            start += base_D.size
        count = out.size // ITEMSIZE[out_dtype]
        wide = Operand(np.concatenate(merged)[skip : skip + count].view(np.uint8), "F64")
        return self.combine([wide], np.ones((1, 1)), out, out_dtype, 1, count), bounded

    def _stream(
        self, operands: Sequence[Operand], n_blocks: int, block_len: int
    ) -> Iterator[tuple[_Span, list[torch.Tensor]]]:
        """Yield each span and the values of all operands on the device, `(rows, length)`, in their stored dtypes."""
        spans = list(_spans(n_blocks, block_len, self._chunk))
        if not spans:
            return
        largest = max(span.rows * span.length for span in spans)
        copying = self._module.Stream()
        # Two slots: while the caller computes on one span, the next one is copied into the other slot.
        slots = [_Slot(operands, largest, self.device, self._module) for _ in range(min(2, len(spans)))]
        slots[0].send(operands, spans[0], block_len, copying)
        for i, span in enumerate(spans):
            if i + 1 < len(spans):
                slots[(i + 1) % 2].send(operands, spans[i + 1], block_len, copying)
            yield span, slots[i % 2].receive(operands, span)
            slots[i % 2].release()


class _Slot:
    """Host and device buffers for one chunk of every operand, with the events that guard their reuse."""

    def __init__(self, operands: Sequence[Operand], largest: int, device: torch.device, module: Any) -> None:
        self.module = module
        is_pinned = device.type != "cpu"
        sizes = [largest * ITEMSIZE[operand.dtype] for operand in operands]
        self.host = [torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned) for size in sizes]
        self.device = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        self.copied, self.used = module.Event(), module.Event()
        self.release()

    def send(self, operands: Sequence[Operand], span: _Span, block_len: int, copying: Any) -> None:
        """Start copying a span to the device, after the slot's previous copy is done and its values were used."""
        self.copied.synchronize()  # the host buffers may still be the source of the previous copy
        with self.module.stream(copying):
            self.used.wait()
            for operand, host, device in zip(operands, self.host, self.device):
                itemsize = ITEMSIZE[operand.dtype]
                start = (span.first * block_len + span.offset) * itemsize
                size = span.rows * span.length * itemsize
                host.numpy()[:size] = operand.data[start : start + size]
                device[:size].copy_(host[:size], non_blocking=True)
            self.copied.record()

    def receive(self, operands: Sequence[Operand], span: _Span) -> list[torch.Tensor]:
        """Return the values on the device; the default stream waits for their copy."""
        self.copied.wait()
        count = span.rows * span.length
        return [
            device[: count * ITEMSIZE[operand.dtype]].view(_DTYPES[operand.dtype]).view(span.rows, span.length)
            for operand, device in zip(operands, self.device)
        ]

    def release(self) -> None:
        """Allow the next copy to start once all work launched so far has finished."""
        self.used.record()


def _deltas(operands: Sequence[Operand], size: int) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yield the base `(D,)` and the differences to it `(N, D)` in float64, `size` elements at a time."""
    count = operands[0].data.size // ITEMSIZE[operands[0].dtype]
    for start in range(0, count, size):
        base_D, *others = (_widened(operand, start, min(start + size, count)) for operand in operands)
        yield base_D, np.stack([x if o.is_delta else x - base_D for o, x in zip(operands[1:], others)])


def _widened(operand: Operand, start: int, stop: int) -> NDArray[np.float64]:
    item = ITEMSIZE[operand.dtype]
    values = torch.frombuffer(bytearray(operand.data[start * item : stop * item]), dtype=_DTYPES[operand.dtype])
    return values.to(torch.float64).numpy()


def _spans(n_blocks: int, block_len: int, chunk: int) -> Iterator[_Span]:
    """Cut the blocks into spans of at most `chunk` elements: parts of one long block, or several short ones."""
    if block_len == 0:
        return
    if block_len >= chunk:
        for first in range(n_blocks):
            for offset in range(0, block_len, chunk):
                yield _Span(first, 1, offset, min(chunk, block_len - offset))
    else:
        rows = chunk // block_len
        for first in range(0, n_blocks, rows):
            yield _Span(first, min(rows, n_blocks - first), 0, block_len)


def _round(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round float64 to nearest even, once; 16-bit results are returned as int16 bits."""
    if dtype in _PRECISION:
        # As in native_isa.h: adding 1.5 * 2^52 units of the last place to keep makes the float64 addition round to
        # that place; subtracting it again is exact. torch's own conversion rounds twice, through float32.
        precision, smallest = _PRECISION[dtype]
        power = (values.view(torch.int64) & (0x7FF << 52)).view(torch.float64)
        addend = power.clamp_(smallest, 2.0**200).mul_(1.5 * 2.0 ** (53 - precision))
        values = (values + addend).sub_(addend).copysign_(values)  # the sign of zero
    if dtype == "F64":
        return values.masked_fill(values.isnan(), torch.nan)
    single = values.to(torch.float32)
    single.masked_fill_(single.isnan(), torch.nan)
    if dtype == "F32":
        return single
    if dtype == "F16":
        return single.to(torch.float16).view(torch.int16).masked_fill_(single.isnan(), 0x7E00)
    return (single.view(torch.int32) >> 16).to(torch.int16)


def _check(operands: Sequence[Operand], n_blocks: int, block_len: int) -> None:
    if not operands:
        raise ValueError("expected at least one operand, got none")
    if n_blocks < 0 or block_len < 0:
        raise ValueError(f"n_blocks and block_len make no sense: {n_blocks}, {block_len}")
    for operand in operands:
        _check_bytes(operand.data, operand.dtype, n_blocks * block_len, "operand")


def _check_bytes(data: NDArray[np.uint8], dtype: str, count: int, what: str) -> None:
    if dtype not in ITEMSIZE:
        raise ValueError(f"dtype must be 'BF16', 'F16', 'F32' or 'F64', got {dtype!r}")
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        raise ValueError(f"{what} must be a contiguous 1-D uint8 array, got {data.dtype} of shape {data.shape}")
    if data.size != count * ITEMSIZE[dtype]:
        raise ValueError(f"{what} must have {count * ITEMSIZE[dtype]} bytes, got {data.size}")
