"""Files that this process opens although nobody named them to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[2]
_FOLDERS = (sys.prefix, sys.base_prefix, str(_PACKAGE), "/proc", "/sys", "/usr")
# Ending as folders do: another folder's name may begin with one of these.
_OF_PYTHON = (*(f"{folder}/" for folder in _FOLDERS), "/dev/null", "/dev/urandom")
_READS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_DIRECTORY


def watch_opens(allowed: Collection[Path], report: Callable[[str], object]) -> None:
    """
    Report, for as long as this process lives, what it opens outside of the files and folders it was given.

    What Python and its libraries read for themselves, lying where they are installed, is left out.

    Args:
        allowed: What the paths of files that may be opened begin with.
        report: Called with a path.
    """
    given = tuple(map(str, allowed))

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], (str, bytes)):
            return
        path, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[2]
        reads = not isinstance(flags, int) or not flags & ~_READS or "/__pycache__/" in path
        if not path.startswith(given) and not (reads and path.startswith(_OF_PYTHON)):
            report(path)

    sys.addaudithook(look)
