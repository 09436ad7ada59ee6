"""Find a checkpoint: a local folder, an fsspec URL, or a Hub id pinned to one commit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_frmerge.checkpoints.files import LocalFolder, RemoteFolder, open_folder
from hf_frmerge.errors import CheckpointError, HubError

# What is fetched from a Hub repository: everything transformers reads, and never a pickle.
DOWNLOAD_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md", "LICENSE*")
# Mistral's own format: the same weights a second time.
IGNORE_PATTERNS = ("consolidated*.safetensors",)

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_LOCAL_URL = re.compile(r"(?:file|local)://(?=/)")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^@\s]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Source:
    """
    One checkpoint, found.

    `spec` is what the user wrote. `path` is a local folder or an fsspec URL. Of a Hub checkpoint, `repo_id`, the
    requested `revision` (None: the default branch) and the `commit` it stood for are known as well.
    """

    spec: str
    kind: Literal["full", "adapter"]
    path: str
    repo_id: str | None = None
    revision: str | None = None
    commit: str | None = None


def resolve(spec: str, *, token: str | bool | None = None, download: bool = True) -> Source:
    """
    Find the folder a user means, downloading it from the Hub if need be.

    Args:
        spec (`str`):
            Local folder, fsspec URL (`s3://bucket/model`), or Hub id (`org/name`, `name`, `org/name@revision`).
        token (`str` or `bool`, *optional*):
            Hub token; by default the one `hf auth login` stored, `False` for none.
        download (`bool`, *optional*, defaults to `True`):
            Fetch the files of a Hub id. If not, its path is `hub://org/name@commit`, to be read by ranges.

    Returns:
        `Source`: Folder, kind, and for a Hub id the commit.

    Raises:
        CheckpointError: If there is no such folder, or it holds no safetensors weights.
        HubError: If the Hub cannot be reached or refuses.
    """
    spec = str(spec)
    local = _LOCAL_URL.sub("", spec)
    if "://" in local:
        return Source(spec, _kind(open_folder(local), spec), local)
    path = Path(local).expanduser()
    if path.is_dir():
        return Source(spec, _kind(LocalFolder(str(path)), spec), str(path))
    if path.exists():
        raise CheckpointError(f"{spec!r} is a file. Pass the folder that holds it, with its config.json.")
    hub_id = _HUB_ID.fullmatch(spec)
    if hub_id is None or spec.startswith((".", "~")):
        raise CheckpointError(f"There is no folder {spec!r} (looked for {path.absolute()}).")
    return _resolve_on_hub(spec, hub_id["repo"], hub_id["revision"], token, download)


def resolve_all(specs: Iterable[str], *, token: str | bool | None = None, download: bool = True) -> list[Source]:
    """Resolve each spec, in order; one that is listed twice is looked up once."""
    found: dict[str, Source] = {}
    sources = []
    for spec in specs:
        if spec not in found:
            found[spec] = resolve(spec, token=token, download=download)
        sources.append(found[spec])
    return sources


def _kind(folder: LocalFolder | RemoteFolder, spec: str) -> Literal["full", "adapter"]:
    try:
        if any(folder.exists(name) for name in _WEIGHTS):
            if not folder.exists("config.json"):
                raise CheckpointError(f"{spec!r} has weights but no config.json. Add the one of its model class.")
            return "full"
        if folder.exists("adapter_config.json"):
            if folder.exists("adapter_model.safetensors"):
                return "adapter"
            raise CheckpointError(f"{spec!r} is an adapter without adapter_model.safetensors. {_convert_hint()}")
        names = _names(folder)
    except OSError as error:
        raise CheckpointError(f"{spec!r} could not be opened: {error}.") from error
    raise _no_weights(spec, names)


def _names(folder: LocalFolder | RemoteFolder) -> list[str]:
    try:
        return folder.names()
    except (OSError, NotImplementedError):
        # A web server need not list its folders; without a list the message just cannot say what is there.
        if isinstance(folder, LocalFolder):
            raise
        return []


def _no_weights(spec: str, names: list[str]) -> CheckpointError:
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES) and name != "training_args.bin"]
    others = [name for name in names if name.endswith(".safetensors")]
    if pickles:
        return CheckpointError(
            f"{spec!r} has pickle weights only ({', '.join(pickles[:3])}). Pickles can run code when opened, so they "
            f"are not read. {_convert_hint()}"
        )
    if others:
        return CheckpointError(
            f"{spec!r} holds neither {' nor '.join(_WEIGHTS)}, but {', '.join(others[:3])}. Pass a folder that "
            "`save_pretrained` wrote."
        )
    if names:
        return CheckpointError(
            f"{spec!r} holds no weights: expected {' or '.join(_WEIGHTS)}, found {', '.join(names[:5])}."
        )
    if "://" in spec:
        return CheckpointError(
            f"{spec!r}: neither {' nor '.join(_WEIGHTS)} was found there. Check the address, and that you may read it."
        )
    return CheckpointError(f"{spec!r} is empty: expected {' or '.join(_WEIGHTS)} and a config.json.")


def _convert_hint() -> str:
    return (
        "Convert it once:\n"
        "    from transformers import AutoModelForCausalLM  # or the class you use\n"
        '    AutoModelForCausalLM.from_pretrained("THIS CHECKPOINT").save_pretrained("converted")'
    )


def _resolve_on_hub(spec: str, repo_id: str, revision: str | None, token: str | bool | None, download: bool) -> Source:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if not download:
            commit = str(HfApi(token=token).model_info(repo_id, revision=revision).sha)
            path = f"hub://{repo_id}@{commit}"
            return Source(spec, _kind(open_folder(path), spec), path, repo_id, revision, commit)
        path = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            allow_patterns=list(DOWNLOAD_PATTERNS),
            ignore_patterns=list(IGNORE_PATTERNS),
        )
    except HFValidationError as error:
        raise CheckpointError(f"{spec!r} is neither a folder nor a valid Hub id: {error}") from error
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError, so it comes first
        raise HubError(
            f"{repo_id} is gated: accept its terms at https://huggingface.co/{repo_id}, then log in with "
            "`hf auth login` or pass a token."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"There is no model {repo_id!r} on the Hub that this token may see, and no local folder {spec!r}. Check "
            "the spelling; a private model needs `hf auth login` or a token with access to it."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no revision {revision!r}. Name a branch, a tag or a full commit id.") from error
    except LocalEntryNotFoundError as error:
        # Fetched by other means (say, from_pretrained) a snapshot lacks README and the like, yet may be all we need.
        path = str(getattr(error, "snapshot_path", ""))
        if not path or not any((Path(path) / name).is_file() for name in _WEIGHTS):
            raise HubError(
                f"{spec!r} is neither a local folder nor in the local cache, and the Hub could not be asked: "
                f"{_first_line(error)} Go online (unset HF_HUB_OFFLINE), or download it beforehand with "
                f"`hf download {repo_id}`."
            ) from error
    except HfHubHTTPError as error:
        raise HubError(f"The Hub refused {spec!r}: {_first_line(error)}") from error
    commit = Path(path).name
    return Source(spec, _hub_kind(path, spec, repo_id, commit, token), path, repo_id, revision, commit)


def _hub_kind(path: str, spec: str, repo_id: str, commit: str, token: str | bool | None) -> Literal["full", "adapter"]:
    folder = LocalFolder(path)
    if any(folder.exists(name) for name in (*_WEIGHTS, "adapter_config.json")):
        return _kind(folder, spec)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        # Pickles are not downloaded; only the repository's own list can tell that they are all there is.
        names = HfApi(token=token).list_repo_files(repo_id, revision=commit)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        names = folder.names()
    raise _no_weights(spec, names)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
