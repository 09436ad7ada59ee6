"""Find checkpoints on the Hub: pin to a commit, look in the cache, and download only the files a merge reads."""

from __future__ import annotations

import glob
import logging
import shutil
from collections.abc import Sequence
from dataclasses import astuple, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.hub.errors import is_unreachable, reading_from_hub
from hf_frmerge.checkpoints.hub.folder import HubFolder, hub_folder
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.modules_file import MODULES_FILE, parse_modules
from hf_frmerge.checkpoints.source import HUB_SCHEME, PICKLES, SAFETENSORS, Source, WeightFiles, is_on_hub, source_of
from hf_frmerge.errors import CheckpointError, HubError

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger(__name__)

# Files that transformers reads beside the weights. No pickle, and from folders only further chat templates:
# `onnx/`, `original/` and the like hold the weights a second time.
_SMALL_FILES = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.spm", "*.codes", "*.py", "README.md", "LICENSE*",
)  # fmt: skip
_SMALL_FOLDER = "additional_chat_templates/"
_NOT_READ = ("trainer_state.json", "*.bin.index.json")


def find(
    spec: str,
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    extra: Sequence[str] = (),
    *,
    allow_pickle: bool = False,
) -> Source:
    """
    Pin a Hub id to a commit, with one request.

    Returns:
        `Source`: In the local cache if all needed files are there, else at `hub://org/name@commit`.

    Raises:
        HubError: If there is no such repository or revision, or the Hub cannot be asked and the cache has none.
        CheckpointError: If the repository holds no weights that may be read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    with reading_from_hub(repo_id, revision):
        try:
            info = HfApi(token=token).model_info(repo_id, revision=revision)
        except (HTTPError, OfflineModeIsEnabled) as error:
            cached = _find_in_cache(spec, repo_id, revision, allow_pickle) if is_unreachable(error) else None
            if cached is None:
                raise
            logger.warning("The Hub could not be asked; %s is taken from the cache, at %s.", repo_id, cached.commit)
            return cached
    if info.id != repo_id:
        logger.warning("%s is now called %s on the Hub.", repo_id, info.id)
    commit = str(info.sha)
    where = info.id, revision, commit
    snapshot = _complete_snapshot(info.id, commit, extra, allow_pickle)
    if snapshot is not None:
        return source_of(LocalFolder(str(snapshot)), spec, str(snapshot), *where, allow_pickle=allow_pickle)
    path = f"{HUB_SCHEME}{info.id}@{commit}"
    return source_of(hub_folder(path, token, anew=True), spec, path, *where, allow_pickle=allow_pickle)


def download_size(sources: Iterable[Source]) -> int:
    """Return the download size of the sources, in bytes, without the files that are in the cache."""
    size = 0
    for source in {source.path: source for source in sources if is_on_hub(source)}.values():
        folder = hub_folder(source.path)
        blobs = _repo_cache(str(source.repo_id)) / "blobs"
        needed = _needed(folder, source.weight_files)
        # The cache names blobs by SHA-256 (large files) or git id (small ones), both of which the Hub lists.
        missing = [n for n in needed if not (blobs / (folder.known_sha256(n) or folder.identity(n))).exists()]
        size += sum(map(folder.size, missing))
    return size


def fetch(sources: Sequence[Source], token: str | bool | None, extra: Sequence[str] = ()) -> list[Source]:
    """
    Download sources from the Hub into its cache, several files at a time; files in the cache are not fetched again.

    Args:
        sources (`Sequence[Source]`):
            Sources of any kind; those that are on this machine are returned unchanged.
        token (`str` or `bool`, *optional*):
            Hub token.
        extra (`Sequence[str]`, *optional*):
            Patterns of further files to fetch.

    Raises:
        HubError: If the disk is too small for all of them, or the Hub refuses or fails.
    """
    check_cache_space(download_size(sources))
    fetched: dict[str, str] = {}
    for source in sources:
        if is_on_hub(source) and source.path not in fetched:
            fetched[source.path] = _download(source, token, extra)
    return [replace(source, path=fetched.get(source.path, source.path)) for source in sources]


def cache_folder() -> Path:
    """Return the folder of the Hub's cache, or its closest parent that exists."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_cache_space(needed: int) -> None:
    """
    Check that a download fits on the disk of the cache.

    Raises:
        HubError: If it does not; the message gives the needed and the free space.
    """
    free = shutil.disk_usage(cache_folder()).free if needed else 0
    if free < needed:
        raise HubError(
            f"The download needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on the disk of "
            f"{cache_folder()}. Free some space, point HF_HOME to a larger disk, or read the models without a "
            "download (--stream-from-hub)."
        )


def _download(source: Source, token: str | bool | None, extra: Sequence[str]) -> str:
    from huggingface_hub import snapshot_download

    repo_id, commit = str(source.repo_id), str(source.commit)
    names = _needed(hub_folder(source.path, token), source.weight_files, extra)
    # Names are escaped, because `allow_patterns` would take a bracket in a file name for a pattern.
    with reading_from_hub(repo_id, source.revision):
        path = snapshot_download(
            repo_id, revision=commit, token=token, allow_patterns=[glob.escape(name) for name in names]
        )
    if source.revision != commit:
        _remember(repo_id, source.revision, commit)
    return path


def _needed(
    folder: LocalFolder | HubFolder,
    files: WeightFiles,
    extra: Sequence[str] = (),
    names: Sequence[str] | None = None,
) -> list[str]:
    """List the files a merge reads: one set of weights, and the small files beside it."""
    names = folder.all_names() if isinstance(folder, HubFolder) else list(names or ())
    small = [
        name
        for name in names
        if (name.startswith(_SMALL_FOLDER) or "/" not in name)
        and _matches(name, _SMALL_FILES)
        and not _matches(name, _NOT_READ)
    ]
    if files.single in names:  # transformers, too, prefers the single file when a folder holds both
        weights = [files.single]
    elif files.index in names:
        weights = [files.index, *sorted(set(_weight_map(folder, files.index).values()))]
    else:
        weights = [files.adapter]
    module_folders = _module_folders(folder, names)
    modules = [name for name in names if name.rpartition("/")[0] in module_folders]
    wanted = {*small, *weights, *modules, *(name for name in names if _matches(name, extra))}
    return [name for name in names if name in wanted]


def _module_folders(folder: LocalFolder | HubFolder, names: Sequence[str]) -> set[str]:
    """Return the folders of sentence-transformers' modules; their files are small."""
    if MODULES_FILE not in names:
        return set()
    modules = parse_modules(folder.read(MODULES_FILE), folder.path)
    return {module.path for module in modules if module.path}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _weight_map(folder: LocalFolder | HubFolder, index: str) -> dict[str, str]:
    try:
        weight_map = parse_json(folder.read(index))["weight_map"]
    except (ValueError, KeyError, TypeError):  # the reader of the checkpoint raises a message for it
        return {}
    return {name: file for name, file in weight_map.items() if isinstance(file, str)}


def _snapshot(repo_id: str, commit: str) -> Path:
    return _repo_cache(repo_id) / "snapshots" / commit


def _repo_cache(repo_id: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def _complete_snapshot(repo_id: str, commit: str, extra: Sequence[str], allow_pickle: bool) -> Path | None:
    """Return the folder of a commit in the cache, if the cache knows its file list and has all needed files."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # before 1.23 the cache had no list of a commit's files, and the Hub is asked for it
        return None

    snapshot = _snapshot(repo_id, commit)
    folder = LocalFolder(str(snapshot))
    try:
        names = [entry.path for entry in get_cached_repo_tree(repo_id, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return None
    is_pickled = allow_pickle and not any(name in names for name in astuple(SAFETENSORS))
    files = PICKLES if is_pickled else SAFETENSORS
    if any(name in names and not folder.is_file(name) for name in (files.index, MODULES_FILE)):
        return None  # these name other files that are needed
    return snapshot if all(folder.is_file(name) for name in _needed(folder, files, extra, names)) else None


def _find_in_cache(spec: str, repo_id: str, revision: str | None, allow_pickle: bool) -> Source | None:
    """
    Return what the cache has of a revision, if it is enough for a merge.

    A snapshot fetched by other means (say, `from_pretrained`) may lack README and the like, which a merge can do
    without.
    """
    ref = _repo_cache(repo_id) / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else str(revision)
    snapshot = _snapshot(repo_id, commit)
    if not snapshot.is_dir():
        return None
    folder = LocalFolder(str(snapshot))
    try:
        return source_of(folder, spec, str(snapshot), repo_id, revision, commit, allow_pickle=allow_pickle)
    except CheckpointError:
        if folder.is_file("config.json") or folder.is_file("adapter_config.json"):
            return None  # an interrupted download
        raise


def _remember(repo_id: str, revision: str | None, commit: str) -> None:
    """Record the commit of a branch in the cache, as the Hub's own client does, for merges without a connection."""
    ref = _repo_cache(repo_id) / "refs" / (revision or "main")
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit, encoding="utf-8")
