"""Turn errors of the Hub's client into one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hf_frmerge.errors import CheckpointError, HubError, MergeError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

BAD_TOKEN = (
    "The token for the Hub has a character that no token has. Copy it again from "
    "https://huggingface.co/settings/tokens to where it is set (HF_TOKEN, `hf auth login` or `hub_token`)."
)


@contextmanager
def reading_from_hub(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """
    Raise errors of the Hub's client as `MergeError`s.

    Raises:
        HubError: If the Hub refuses, fails, or cannot be reached, or the token cannot be one.
        CheckpointError: If `repo_id` is not a valid Hub id.
    """
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except MergeError:
        raise
    except UnicodeEncodeError as error:  # headers are ASCII
        raise HubError(BAD_TOKEN) from error
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is neither a folder nor a valid Hub id: {error}") from error
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise HubError(_sentence(_first_cause(error), repo_id, revision)) from error


def is_unreachable(error: BaseException) -> bool:
    """Whether the Hub did not answer (offline, connection lost, server error, rate limit); then the cache may do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return True


def _first_cause(error: BaseException) -> BaseException:
    """Return the error behind a "not in the cache", which is what the client raises when a download fails."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        spec = repo_id if revision is None else f"{repo_id}@{revision}"
        return (
            f"{spec!r} is neither a local folder nor in the local cache, and offline mode is on. Go online (unset "
            f"HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE), or download it beforehand with `hf download {repo_id}`."
        )
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, repo_id, revision)
    return (
        f"The Hub could not be reached for {repo_id} ({type(error).__name__}). Check the connection and try again; "
        "files that were downloaded are kept."
    )


def _refusal(error: HfHubHTTPError, repo_id: str, revision: str | None) -> str:
    """Explain an HTTP error of the Hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    if isinstance(error, GatedRepoError):  # a subclass of RepositoryNotFoundError, so it comes first
        page = f"{constants.ENDPOINT}/{repo_id}"
        if status == 403:
            return f"{repo_id} is gated: accept its terms at {page} and wait for access if they ask you to."
        return f"{repo_id} is gated: accept its terms at {page}, then log in with `hf auth login` or pass a token."
    if isinstance(error, DisabledRepoError):
        return f"{repo_id} was disabled on the Hub, so nobody can download it."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model {repo_id!r} on the Hub that this token may see, and no local folder {repo_id!r}. "
            "Check the spelling; a private model needs `hf auth login` or a token with access to it."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}. Name a branch, a tag or a full commit id."
    if isinstance(error, EntryNotFoundError):
        return f"A file of {repo_id} is gone from the Hub: {error.response.url}."
    if status == 401:
        return (
            f"The Hub does not accept your token, so {repo_id} was not read. Run `hf auth login` again, or correct or "
            "unset HF_TOKEN."
        )
    if status == 403:
        return f"Your token may not read {repo_id}. Use one whose permissions include it."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if wait else "in a few minutes"
        return (
            f"The Hub limits the rate of requests. Try {repo_id} again {when}; files that were downloaded are kept. "
            "Who is logged in (`hf auth login`) may ask more often."
        )
    if status >= 500:
        return f"The Hub failed (HTTP {status}) at {repo_id}. Try again later; files that were downloaded are kept."
    return f"The Hub refused {repo_id} (HTTP {status}): {error.server_message or error}"
