"""Push a finished merge to the Hugging Face Hub in one commit, after checking that nothing private is in it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from hf_frmerge.checkpoints.hub.errors import BAD_TOKEN
from hf_frmerge.checkpoints.lock import sole_writer
from hf_frmerge.errors import ArgumentError, HubError
from hf_frmerge.hub.outgoing import check_base_is_public, check_complete, check_nothing_local, outgoing_files
from hf_frmerge.merging.record.manifest import MANIFEST_FILE
from hf_frmerge.merging.record.write_manifest import record_checksums
from hf_frmerge.provenance.intact import check_unaltered

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)

# Weight files of the layouts we write. Those of an earlier push that the new one does not replace are deleted with
# it: from_pretrained prefers a leftover `model.safetensors` to new shards and would load the old model.
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")

_NOT_LOGGED_IN = (
    "Cannot push to {}: you are not logged in, or your token is not accepted. Run `hf auth login`, set HF_TOKEN, or "
    "pass `hub_token`."
)


@overload
def push_folder(
    output_dir: Path | str,
    *,
    repo_id: str,
    token: str | None = ...,
    private: bool | None = ...,
    revision: str | None = ...,
    commit_message: str = ...,
    create_pr: bool = ...,
    collection: str | None = ...,
    blocking: Literal[True] = ...,
) -> CommitInfo: ...


@overload
def push_folder(
    output_dir: Path | str,
    *,
    repo_id: str,
    token: str | None = ...,
    private: bool | None = ...,
    revision: str | None = ...,
    commit_message: str = ...,
    create_pr: bool = ...,
    collection: str | None = ...,
    blocking: bool,
) -> CommitInfo | Future[CommitInfo]: ...


def push_folder(
    output_dir: Path | str,
    *,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload merged model",
    create_pr: bool = False,
    collection: str | None = None,
    blocking: bool = True,
) -> CommitInfo | Future[CommitInfo]:
    """
    Push the folder of a finished merge, card included, as one commit.

    All checks run before the first request: the merge is finished, its files are unchanged since, and none contains
    a local path or the token. SHA-256 checksums that the manifest lacks are added to it. The lock of the folder is
    held until all is uploaded, so that no merge writes there meanwhile.

    The repository and, with `revision`, the branch are created if they do not exist. Pushing unchanged files makes
    no commit. After an interrupted push, files that have arrived are not uploaded again.

    Args:
        output_dir (`Path` or `str`):
            Folder a merge wrote, with its card and manifest.
        repo_id (`str`):
            Hub id; the namespace defaults to the logged-in user.
        token (`str`, *optional*):
            Access token with write permission; else `HF_TOKEN` or the one saved by `hf auth login`.
        private (`bool`, *optional*):
            Whether a new repository is private; `None` leaves it to the account's or organisation's default.
        revision (`str`, *optional*):
            Branch to push to, `main` if not given.
        commit_message (`str`, *optional*):
            First line of the commit.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request against `main` instead of committing to it.
        collection (`str`, *optional*):
            Slug of a collection to add the model to, such as `me/merges-64f9a2`.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait for the upload.

    Returns:
        `CommitInfo`, or with `blocking=False` a `Future` of it.

    Raises:
        ArgumentError: If the arguments contradict each other or `repo_id` is not a valid id.
        HubError: If the folder is not a finished merge, was changed since or contains a local path or the token, or
            if the Hub refuses.
        MergeError: If a merge is writing to the folder right now.
    """
    from huggingface_hub import HfApi, get_token

    from hf_frmerge import __version__

    check_branch(revision, create_pr)
    # All local checks come first: a refused push should not leave an empty repository on the Hub.
    folder = Path(output_dir)
    check_complete(folder)
    secret = token or get_token()  # also a token the client would find by itself must not be published
    check_base_is_public(folder)
    with ExitStack() as lock:
        if os.access(folder, os.W_OK):
            lock.enter_context(sole_writer(folder))
        check_nothing_local(folder, secret)
        additions = _checked_additions(folder)
        api = HfApi(token=token, library_name="hf_frmerge", library_version=__version__)
        with _clear_errors(repo_id, secret):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision not in (None, "main") and not create_pr:
                api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        held = lock.pop_all()

    def upload() -> CommitInfo:
        with held, _clear_errors(repo_id, secret):
            commit = _commit(api, additions, repo_id, revision, commit_message, create_pr)
        if collection is not None:
            _add_to_collection(api, collection, repo_id, secret)
        return commit

    return upload() if blocking else api.run_as_future(upload)


def check_branch(revision: str | None, create_pr: bool) -> None:
    """Raise `ArgumentError` if a branch was named for a pull request."""
    if create_pr and revision not in (None, "main"):
        raise ArgumentError(
            f"A pull request is opened against `main`, but `revision={revision!r}` was given. Leave one of them out."
        )


def full_repo_id(repo_id: str, token: str | None = None) -> str:
    """
    Return a Hub id with its namespace, which defaults to the logged-in user.

    Raises:
        ArgumentError: If it can be no Hub id.
        HubError: If no user is logged in, or the Hub cannot be reached.
    """
    from huggingface_hub import get_token, whoami
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    with _clear_errors(repo_id, token or get_token()):
        validate_repo_id(repo_id)
        if "/" in repo_id:
            return repo_id
        try:
            return f"{whoami(token=token)['name']}/{repo_id}"
        except LocalTokenNotFoundError as error:
            raise HubError(_NOT_LOGGED_IN.format(repo_id)) from error


def _checked_additions(folder: Path) -> list[CommitOperationAdd]:
    """
    Return the files of the commit, after checking that they are unchanged since the merge.

    The client has to hash every file for the upload anyway. The check and the manifest reuse these hashes: reading
    all weights a second time would take minutes.
    """
    from huggingface_hub import CommitOperationAdd

    files = outgoing_files(folder)
    additions = {name: CommitOperationAdd(name, content) for name, content in files.items() if name != MANIFEST_FILE}
    sha256 = {name: addition.upload_info.sha256.hex() for name, addition in additions.items()}
    check_unaltered(folder, sha256)
    record_checksums(folder, sha256)
    manifest = outgoing_files(folder)[MANIFEST_FILE]  # read again: `record_checksums` has just changed it
    return [*additions.values(), CommitOperationAdd(MANIFEST_FILE, manifest)]


def _commit(
    api: HfApi,
    additions: list[CommitOperationAdd],
    repo_id: str,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> CommitInfo:
    """
    Upload all files and commit them at once, deleting weight files of an earlier push that are not replaced.

    `create_commit` and not `upload_folder`: with Xet, the latter commits large folders in several steps, README
    first. Until the last step, or for good if interrupted, the Hub would show a card above half a model.
    """
    from huggingface_hub import CommitOperationDelete

    new = {addition.path_in_repo for addition in additions}
    # A pull request is based on `main`, whatever `revision` is.
    existing = api.list_repo_files(repo_id, revision=None if create_pr else revision)
    stale = [name for name in existing if _WEIGHTS.fullmatch(name) and name not in new]
    if stale:
        logger.info("Deleting %d weight files of an earlier push from %s: %s.", len(stale), repo_id, ", ".join(stale))
    return api.create_commit(
        repo_id,
        operations=[*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
        commit_message=commit_message,
        revision=revision,
        create_pr=create_pr,
    )


def _add_to_collection(api: HfApi, collection: str, repo_id: str, secret: str | None) -> None:
    """Add the pushed model to a collection. An error says that the push itself has succeeded."""
    try:
        with _clear_errors(collection, secret):
            api.add_collection_item(collection, item_id=repo_id, item_type="model", exists_ok=True)
    except HubError as error:
        raise HubError(f"{repo_id} was pushed, but not added to the collection {collection}: {error}") from error


@contextmanager
def _clear_errors(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn exceptions of the Hub's client into a `HubError` that says what to do; the token is masked in it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except HubError:
        raise
    except UnicodeEncodeError as error:  # headers are ASCII
        raise HubError(BAD_TOKEN) from error
    except HFValidationError as error:
        raise ArgumentError(
            f"{repo_id!r} is not a valid Hub id: expected `namespace/name`, of letters, digits, `-`, `_` and `.`."
        ) from error
    except (OfflineModeIsEnabled, HTTPError, RuntimeError, ValueError) as error:
        # The client wraps an error with one large file in a RuntimeError; the real one is its cause.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OfflineModeIsEnabled):
            sentence = f"Cannot push to {repo_id}: offline mode is on. Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE."
        elif isinstance(cause, HfHubHTTPError):
            sentence = _http_sentence(cause, repo_id)
        elif isinstance(cause, HTTPError):  # base class of the client's connection errors and time-outs
            sentence = (
                f"Cannot push to {repo_id}: the Hub could not be reached ({type(cause).__name__}). Check the "
                "connection and push again; files that had arrived are not sent twice."
            )
        elif isinstance(cause, ValueError):  # the Hub rejected the card's front matter
            sentence = f"The Hub refused the push to {repo_id}: {cause}"
        else:
            raise
        raise HubError(sentence.replace(token, "<HUB_TOKEN>") if token else sentence) from error


def _http_sentence(error: HfHubHTTPError, repo_id: str) -> str:
    """Explain an HTTP error of a push, and say what to do about it."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = error.response.status_code
    if isinstance(error, GatedRepoError):  # a subclass of RepositoryNotFoundError, so tested first
        return f"{repo_id} is gated. Ask for access on its page on the Hub, then push again."
    if status == 401:
        return _NOT_LOGGED_IN.format(repo_id)
    if status == 403:
        return (
            f"Cannot push to {repo_id}: your token may not write there. Use a token with write permission, or a "
            "`hub_model_id` in a namespace of yours."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such branch. Give an existing branch as `hub_revision`, or none."
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist, or it is private and your token does not reach it."
    if status in (409, 412):
        return f"{repo_id} was changed by someone else during the push. Push again."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if wait else "later"
        return f"The Hub limits the rate of requests. Push to {repo_id} again {when}; what arrived is not sent twice."
    if status >= 500:
        return (
            f"The Hub failed (HTTP {status}) during the push to {repo_id}. Push again later; nothing is half visible."
        )
    return f"The Hub refused the push to {repo_id} (HTTP {status}): {error.server_message or error}"
