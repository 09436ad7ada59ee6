"""Outputs behind fsspec URLs: merged in a local folder that stands for the URL, then uploaded, the config last."""

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
_STALE = re.compile(r"config\.json|model.*\.safetensors(\.index\.json)?")


def local_folder(output_dir: str) -> str:
    """
    Return where a merge is made: the folder itself or, for a URL, one in the cache, always the same.

    Its path is made of the URL, so it can be resumed like any other, and `url_of` finds the way back.
    """
    output_dir = _LOCAL_URL.sub("", output_dir)
    if "://" not in output_dir:
        return str(Path(output_dir).expanduser())
    parent, _, name = output_dir.rstrip("/").rpartition("/")
    return str(_cache() / quote(parent, safe="") / name)


def url_of(folder: str | Path) -> str | None:
    """Return the URL a folder stands for; `None` if it is a folder like any other."""
    folder = Path(folder)
    return f"{unquote(folder.parent.name)}/{folder.name}" if folder.parent.parent == _cache() else None


def check_vacant(folder: str | Path) -> None:
    """Refuse a URL that holds a model; there is nothing to refuse for a local folder."""
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
    Upload a finished merge to the URL its folder stands for, if it stands for one.

    A model that is there loses its config and weights first, and the new config goes last: what is there in between is
    no model to any loader.

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
