"""Shorten local paths in public texts, and tell local paths from Hub ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.source import is_hub_id
from hf_frmerge.merging.record.manifest import read_manifest

if TYPE_CHECKING:
    from hf_frmerge.hub.card.data import CardSource

_PART = r"[^\s/\\'\"`,;:)\]}|]+"
# An absolute POSIX path of two parts or more, `~/...`, `file:///...` or a Windows path; not the path of a URL.
_ABSOLUTE_PATH = re.compile(
    rf"(?:file://|(?<![\w:/.~@-]))(?:(?:/{_PART}){{2,}}|~(?:/{_PART})+)/?" rf"|(?<!\w)[A-Za-z]:(?:\\+{_PART})+\\*"
)


def hide_local_paths(text: str, sources: Sequence[CardSource] = ()) -> str:
    """
    Shorten local paths in `text` to their last part, as `./name`.

    Args:
        text (`str`):
            Text that will be published.
        sources (`Sequence[CardSource]`, *optional*):
            Sources whose local specs, including relative ones, are replaced by their folder name.

    Returns:
        `str`: Text without absolute paths; URLs and Hub ids are unchanged.

    Example:
    ```python
    >>> hide_local_paths("differs from /home/ann/experts/math: see https://hf.co/docs/hub")
    'differs from ./math: see https://hf.co/docs/hub'

    ```
    """
    local = [source for source in sources if source.repo_id is None]
    # Longest first: `models/math` would otherwise break `models/math-v2`.
    for source in sorted(local, key=lambda source: len(source.spec), reverse=True):
        if re.search(r"[\\/~]", source.spec):  # a bare folder name has nothing to hide and may be an ordinary word
            text = text.replace(source.spec, f"./{source.name}")
    return _ABSOLUTE_PATH.sub(lambda match: "./" + re.split(r"[\\/]", match[0].rstrip("\\/"))[-1], text)


def is_public_base(folder: Path, name: str) -> bool:
    """
    Whether `name`, the base model of the merged adapter in `folder`, is on the Hub.

    A relative path such as `models/base` looks like a Hub id. So the manifest decides, and without it an existing path
    counts as local.
    """
    base = read_manifest(folder).base_model
    if base is not None and base.on_hub and base.id == name:
        return True
    return "/" in name and is_hub_id(name) and not Path(name).exists()
