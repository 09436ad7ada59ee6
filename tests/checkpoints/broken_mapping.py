"""Run as a program: a mapped file is cut short, and then touched by whatever touches mapped files."""

from __future__ import annotations

import faulthandler
import mmap
import os
import sys
import tempfile
import threading

import numpy as np
import torch
import xxhash

from hf_frmerge.checkpoints.page_cache import MappedRange, Mapping, prefetch
from hf_frmerge.kernels.interface import Operand
from hf_frmerge.kernels.native import NativeKernels, _native
from hf_frmerge.kernels.torch_backend import TorchKernels

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 64 * PAGE


def cut_short(keep: int) -> tuple[Mapping, np.ndarray]:
    """A mapping of ones, faulted in, of which all but `keep` pages go."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"\1" * SIZE)
        file.flush()
        mapping = Mapping(file.name, SIZE)
        prefetch([MappedRange(mapping, 0, SIZE)])
        view = mapping.held(0, SIZE)
        assert view is not None and not mapping.is_broken
        os.truncate(file.name, keep * PAGE)
    return mapping, view


def expect_broken(touch) -> None:
    mapping, view = cut_short(keep=3)
    whole, other = cut_short(keep=64)
    touch(view)
    assert mapping.is_broken and not whole.is_broken
    assert bytes(view) == b"\1" * (3 * PAGE) + bytes(SIZE - 3 * PAGE)
    assert bytes(other) == b"\1" * SIZE


def touch_all() -> None:
    expect_broken(lambda view: view.sum())
    expect_broken(lambda view: xxhash.xxh3_128_hexdigest(view.data))
    expect_broken(lambda view: torch.from_numpy(view).sum())
    expect_broken(lambda view: view.copy())
    table, out, half = np.ones((1, 2)), np.empty(SIZE, np.uint8), SIZE // 2
    for kernels in (*map(NativeKernels, _native.levels()), TorchKernels("cpu")):
        expect_broken(lambda view, k=kernels: k.gram_and_digests([Operand(view, "BF16")] * 3, 1, half))
        expect_broken(lambda view, k=kernels: k.combine([Operand(view, "BF16")] * 2, table, out, "BF16", 1, half))
        expect_broken(lambda view, k=kernels: k.count_nonfinite(Operand(view, "BF16")))


def touch_from_threads() -> None:
    mapping, view = cut_short(keep=0)
    threads = [threading.Thread(target=view.sum) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mapping.is_broken and not view.any()


def guards_are_used_again() -> None:
    numbers = set()
    for _ in range(50):
        mapping, view = cut_short(keep=0)
        numbers.add(mapping._guard)
        part = view[PAGE:]
        del mapping, view
        assert not part.any()  # a view alone keeps its guard
    assert len(numbers) < 10


def foreign() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"\1" * SIZE)
        file.flush()
        view = memoryview(mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ))
        os.ftruncate(file.fileno(), 0)
        bytes(view)


if __name__ == "__main__":
    when, what = sys.argv[1:]
    if when == "before":
        faulthandler.enable()
    expect_broken(lambda view: view.sum())
    if when == "after":
        faulthandler.enable()
    if what == "others":
        foreign()
    touch_all()
    touch_from_threads()
    guards_are_used_again()
    print("alive")
