"""Outputs behind fsspec URLs: the merge is written to a local folder and uploaded when it is complete."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from hf_frmerge.errors import ArgumentError, MergeError

logger = logging.getLogger(__name__)

_CONFIG = "config.json"
_LOCAL_URL = re.compile(r"(?:file|local)://(?=/)")
# Files of an older model at the URL without which no loader can load it.
_STALE = re.compile(r"config\.json|model.*\.safetensors(\.index\.json)?")


def local_folder(output_dir: str) -> str:
    """
    Return the local folder a merge writes to: the folder itself or, for a URL, one in the cache.

    The path encodes the URL. The same URL thus gives the same folder, so that a merge can be resumed, and `url_of` can
    recover the URL.
    """
    output_dir = _LOCAL_URL.sub("", output_dir)
    if "://" not in output_dir:
        return str(Path(output_dir).expanduser())
    # Quoted with safe="", the parent is a single path component, which `url_of` can unquote.
    parent, _, name = output_dir.rstrip("/").rpartition("/")
    return str(_cache() / quote(parent, safe="") / name)


def url_of(folder: str | Path) -> str | None:
    """Return the URL that a folder of the cache is uploaded to; `None` for any other folder."""
    folder = Path(folder)
    return f"{unquote(folder.parent.name)}/{folder.name}" if folder.parent.parent == _cache() else None


def check_vacant(folder: str | Path) -> None:
    """Raise `ArgumentError` if there is a model at the URL of a folder. Does nothing for a local folder."""
    url = url_of(folder)
    if url is None:
        return
    store, root = _open(url)
    if store.exists(f"{root}/{_CONFIG}"):
        raise ArgumentError(
            f"There is a model at {url}. Choose another output_dir, or pass --overwrite to replace it."
        )


def upload(folder: str | Path) -> None:
    """
    Upload a finished merge to the URL of its folder, if it has one.

    Config and weights of an older model are removed first, and the new config is uploaded last, so that no loader can
    load a mixture of the two in between.

    Raises:
        MergeError: If the store fails; the finished merge stays in the folder.
    """
    url = url_of(folder)
    if url is None:
        return
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith(".")]
    store, root = _open(url)
    try:
        for old in store.find(root, maxdepth=1):
            if _STALE.fullmatch(old.rpartition("/")[2]):
                store.rm_file(old)
        # False sorts before True: the config comes last.
        for path in sorted(paths, key=lambda path: (path.name == _CONFIG, path)):
            target = f"{root}/{path.relative_to(folder).as_posix()}"
            store.makedirs(target.rpartition("/")[0], exist_ok=True)
            store.put_file(str(path), target)
    except Exception as error:  # each store raises the errors of its own client library
        raise MergeError(
            f"The merge could not be uploaded to {url}: {type(error).__name__}: {error}. It is finished in {folder}: "
            f"copy it from there, {_CONFIG} last."
        ) from error
    logger.warning("Uploaded to %s. The copy in %s is no longer needed.", url, folder)


def _cache() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "frmerge" / "outputs"


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        store, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # no such protocol, or its package is not installed
        raise ArgumentError(f"Cannot write to {url!r}: {error}") from error
    return store, root.rstrip("/")
