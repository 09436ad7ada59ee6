"""Several ranges faulted in at once: all are there, or none is said to be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_frmerge.checkpoints.page_cache import MappedRange, Mapping, prefetch, release

PAGE = os.sysconf("SC_PAGE_SIZE")
SIZE = 5 * PAGE + 17


@pytest.fixture
def mappings(tmp_path: Path) -> list[Mapping]:
    actual = []
    for i in range(3):
        path = tmp_path / f"{i}"
        path.write_bytes(np.random.default_rng(i).bytes(SIZE))
        actual.append(Mapping(str(path), SIZE))
    return actual


def expected(i: int) -> bytes:
    return np.random.default_rng(i).bytes(SIZE)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files are read, not mapped")
def test_ranges_of_several_files_at_once(mappings: list[Mapping]) -> None:
    pytest.importorskip("hf_frmerge.kernels._native", reason="without it files are read, not mapped")
    ranges = [MappedRange(m, 3 + i, SIZE - PAGE * i) for i, m in enumerate(mappings)]
    assert all(m.held(start, stop) is None for m, start, stop in ranges)
    prefetch(ranges)
    for i, (mapping, start, stop) in enumerate(ranges):
        view = mapping.held(start, stop)
        assert view is not None and view.tobytes() == expected(i)[start:stop]
        assert mapping.held(start, stop - 1) is None


def test_released_ranges_are_held_no_more_and_can_be_read_again(mappings: list[Mapping]) -> None:
    mapping = mappings[0]
    parts = [MappedRange(mapping, start, start + 2 * PAGE) for start in (0, 2 * PAGE)]
    prefetch(parts)
    release([MappedRange(mapping, 0, 3 * PAGE)])  # the first lies in it, the second does not
    assert mapping.held(0, 2 * PAGE) is None
    release([MappedRange(mapping, 0, SIZE)])
    assert mapping.held(2 * PAGE, 4 * PAGE) is None
    prefetch(parts)
    view = mapping.view(0, 2 * PAGE)
    assert view is None or view.tobytes() == expected(0)[: 2 * PAGE]


def test_one_file_cut_short_fails_all_and_is_named_alone(mappings: list[Mapping], tmp_path: Path) -> None:
    os.truncate(tmp_path / "1", PAGE)
    ranges = [MappedRange(m, 0, SIZE) for m in mappings]
    prefetch(ranges)  # and not SIGBUS
    assert all(m.held(start, stop) is None for m, start, stop in ranges)
    for i in (0, 2):
        view = mappings[i].view(0, SIZE)
        assert view is None or view.tobytes() == expected(i)
    with pytest.raises(OSError, match=f"it had {SIZE} bytes and now has {PAGE}"):
        mappings[1].view(0, SIZE)


def test_empty_ranges_and_none(mappings: list[Mapping]) -> None:
    prefetch([])
    release([])
    prefetch([MappedRange(mappings[0], 7, 7)])
    view = mappings[0].view(7, 7)
    assert view is None or view.size == 0


@pytest.mark.parametrize("wrong", [None, [b"a list"], (3,), ("text",)])
def test_what_is_no_tuple_of_buffers_is_refused(wrong: object) -> None:
    native = pytest.importorskip("hf_frmerge.kernels._native")
    for function in (native.fault_in, native.give_back):
        with pytest.raises(TypeError):
            function(wrong)


def run_broken_mapping(when: str, what: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("hf_frmerge.kernels._native", reason="without it files are read, not mapped")
    program = [sys.executable, str(Path(__file__).with_name("broken_mapping.py")), when, what]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files are read, not mapped")
@pytest.mark.parametrize("when", ["before", "after", "never"])  # when another handler of SIGBUS is installed
def test_pages_that_are_gone_read_as_zeros_and_break_their_mapping_only(when: str) -> None:
    actual = run_broken_mapping(when, "ours")
    assert (actual.returncode, actual.stdout) == (0, "alive\n"), actual.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files are read, not mapped")
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_pages_of_others_are_left_to_the_handler_that_was_there(when: str) -> None:
    actual = run_broken_mapping(when, "others")
    assert actual.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in actual.stderr) == (when != "never")
