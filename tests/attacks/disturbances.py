"""Faults of the system, kills and concurrent merges: what they leave, and whether a resume ends in the right bits."""

from __future__ import annotations

import errno
import io
import mmap
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from attacks import children
from attacks.site import Site, empty

_WRITES = ("pwrite", "write")
CALLS = (
    *("pwrite", "write", "fsync", "replace", "unlink", "mkdir", "rmdir", "open", "close"),
    *("posix_fallocate", "listdir", "stat"),
)
"""Calls of a merge to the system that can go wrong."""

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE)


@dataclass(frozen=True)
class Fault:
    """
    One call to the system that goes wrong.

    Attributes:
        call: its name in `os`; `write` stands for files that Python writes, `open` for those that it opens, too.
        number: which of these calls of the process it is, from 0.
        how: an error number; `"short"`, of a write that takes half; `"kill"`, for a process that dies of it; or
            `"killed after"`.
    """

    call: str
    number: int
    how: int | str

    def install(self, happened: mmap.mmap) -> None:
        """Make the call of this process fail, and set the first byte of `happened` when it does."""
        seen = 0

        def around(real: Callable[..., Any], cuts: int | None) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen != self.number + 1:
                    return real(*args, **options)
                happened[0] = 1
                if isinstance(self.how, int):
                    raise OSError(self.how, os.strerror(self.how))
                if self.how == "killed after":
                    real(*args, **options)
                if self.how == "short":
                    if cuts is None or not len(args[cuts]):
                        return real(*args, **options)
                    data = memoryview(args[cuts])
                    return real(*args[:cuts], data[: (len(data) + 1) // 2], *args[cuts + 1 :], **options)
                os.kill(os.getpid(), signal.SIGKILL)
                return None

            return call

        _surround(self.call, around)


def _surround(name: str, around: Callable[[Callable[..., Any], int | None], Callable[..., Any]]) -> None:
    """Put a function around a call of this process; it is told which argument holds what is written, if one does."""
    if name == "write":
        os.fdopen = _Unbuffered(os.fdopen, lambda real: around(real, 0))  # type: ignore[assignment]
    elif name == "open":
        os.open = around(os.open, None)  # type: ignore[assignment]
        io.open = around(io.open, None)  # type: ignore[assignment]
    else:
        setattr(os, name, around(getattr(os, name), 1 if name == "pwrite" else None))


class _Unbuffered:
    """`os.fdopen`, of which unbuffered files write by way of another function."""

    def __init__(self, real: Callable[..., Any], around: Callable[..., Any]) -> None:
        self._real, self._around = real, around
        self._write: Callable[..., Any] | None = None

    def __call__(self, fd: int, *args: Any, **options: Any) -> Any:
        file = self._real(fd, *args, **options)
        if options.get("buffering") != 0:
            return file
        write = self._around(file.write)

        class Written:
            def __getattr__(self, name: str) -> Any:
                return write if name == "write" else getattr(file, name)

        return Written()


@cache
def calls_of(site: Site, name: str) -> dict[str, int]:
    """Count the calls to the system of an undisturbed merge, so that the faults chosen are of calls that it makes."""
    counts = mmap.mmap(-1, 8 * len(CALLS))  # shared with the child

    def count() -> None:
        def around(place: int) -> Callable[[Callable[..., Any], int | None], Callable[..., Any]]:
            def counted(real: Callable[..., Any], _: int | None) -> Callable[..., Any]:
                def call(*args: Any, **options: Any) -> Any:
                    seen = int.from_bytes(counts[8 * place : 8 * place + 8], "little")
                    counts[8 * place : 8 * place + 8] = (seen + 1).to_bytes(8, "little")
                    return real(*args, **options)

                return call

            return counted

        for place, call in enumerate(CALLS):
            _surround(call, around(place))

    ended = children.run([*site.merges[name], "--output-dir", empty(site.root / "out")], site.log, count)
    assert ended.code == 0, ended
    numbers = [int.from_bytes(counts[8 * i : 8 * i + 8], "little") for i in range(len(CALLS))]
    return {call: number for call, number in zip(CALLS, numbers) if number}


def random_fault(site: Site, name: str, rng: random.Random) -> Fault:
    """Choose a fault of a call that the merge makes."""
    calls = calls_of(site, name)
    call = rng.choice(list(calls))
    ways: list[int | str] = [*ERRORS, "kill", "killed after", *(["short"] if call in _WRITES else [])]
    return Fault(call, rng.randrange(calls[call]), rng.choice(ways))


@dataclass
class Tally:
    """
    What came of attacks.

    Attributes:
        tried, held: numbers of attacks.
        failures: a sentence for each that did not hold.
        seen: what was observed, by name.
    """

    tried: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, what: object, troubles: list[str]) -> None:
        self.tried += 1
        self.held += not troubles
        self.failures += [f"{what}: {trouble}" for trouble in troubles]


def attack_with_fault(site: Site, name: str, rng: random.Random, tally: Tally) -> None:
    """Merge with a fault; look at what is left; resume."""
    fault, happened = random_fault(site, name, rng), mmap.mmap(-1, 1)
    out = empty(site.root / "out")
    ended = children.run([*site.merges[name], "--output-dir", out], site.log, lambda: fault.install(happened))
    if not happened[0]:
        tally.seen["never happened"] += 1
    else:
        tally.seen["ended well" if ended.code == 0 else "killed" if ended.code < 0 else "refused"] += 1
    tally.add((name, fault), _troubles(site, name, out, ended) + _resume(site, name, out, ended))


def attack_with_kill(site: Site, name: str, rng: random.Random, longest: float, tally: Tally) -> None:
    """Kill a merge at a random moment, up to `longest` seconds after its start; look at what is left; resume."""
    out = empty(site.root / "out")
    child = children.start([*site.merges[name], "--output-dir", out], site.log)
    children.wait_until((out / ".frmerge").exists, child)
    time.sleep(rng.uniform(0, longest))
    child.kill()
    ended = child.wait()
    tally.seen["ended well" if ended.code == 0 else "killed"] += 1
    tally.add((name, "SIGKILL"), _troubles(site, name, out, ended) + _resume(site, name, out, ended))


def attack_with_another(site: Site, rng: random.Random, longest: float, tally: Tally) -> None:
    """Start a second merge, of another method, into the folder of a first; the folder must be that of one of them."""
    out = empty(site.root / "out")
    names = rng.sample(("full", "sparse"), 2)
    options = [rng.choice(([], ["--overwrite"], ["--resume"])) for _ in names]
    pair = []
    for name, option in zip(names, options):
        log = site.root / f"log-{name}"
        pair.append(children.start([*site.merges[name], "--output-dir", out, *option], log))
        if rng.random() < 0.5:
            children.wait_until((out / ".frmerge").exists, pair[0])
        time.sleep(rng.uniform(0, longest))
    ends = [child.wait() for child in pair]
    troubles = [f"{end.fault}: {end.text[-300:]}" for end in ends if end.fault]
    winners = [name for name, end in zip(names, ends) if end.code == 0]
    if not winners:
        troubles.append(f"neither came to an end: {[end.text[-200:] for end in ends]}")
    elif all(site.trouble(name, out) for name in winners):
        troubles.append(f"the folder is that of none of {winners}: {site.trouble(winners[-1], out)}")
    elif children.run(["verify", out], site.log).code != 0:
        troubles.append(f"{winners} ended, and verify finds fault: {site.log.read_text()[-300:]}")
    tally.seen[f"{len(winners)} of 2 ended"] += 1
    tally.add((*names, options), troubles)


def _troubles(site: Site, name: str, out: Path, ended: children.Ended) -> list[str]:
    troubles = [f"{ended.fault}: {ended.text[-300:]}"] if ended.fault else []
    left = site.trouble(name, out)
    if left:
        troubles.append(left)
    elif ended.code == 0 and not (out / "merge_manifest.json").exists():
        troubles.append("exit code 0, and no model")
    if not site.inputs_are_untouched():
        troubles.append("an input was changed")
    return troubles


def _resume(site: Site, name: str, out: Path, before: children.Ended) -> list[str]:
    """Resume a merge that did not end well; it must end in the right bits, or say that it is complete."""
    if before.code == 0:
        return []
    ended = children.run([*site.merges[name], "--output-dir", out, "--resume"], site.log)
    troubles = _troubles(site, name, out, ended)
    if ended.code != 0 and "is complete; there is nothing to resume" not in ended.text:
        troubles.append(f"the resume failed: {ended.text[-300:]}")
    return [f"resumed, {trouble}" for trouble in troubles]
