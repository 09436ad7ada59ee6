"""Hub repository at one commit, read by byte ranges: for plans, and for merges without a download."""

from __future__ import annotations

import errno
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.checkpoints.hub.errors import reading_from_hub
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.checkpoints.source import HUB_SCHEME

if TYPE_CHECKING:
    from huggingface_hub import RepoFile
    from numpy.typing import NDArray

# First request to a weight file. Most headers are shorter than this, so that one request gets the whole header.
_FIRST_BYTES = 1 << 17
# Ranges fetched in the Gram pass are kept for the combine pass, up to this many bytes over all repositories.
_KEPT_BYTES = 256 << 20

_Range = tuple[str, int, int]

_folders: dict[str, HubFolder] = {}


def hub_folder(path: str, token: str | bool | None = None, *, anew: bool = False) -> HubFolder:
    """
    Return the folder of `hub://org/name@commit`; the same object for every call, so that its files are listed once.

    Args:
        path (`str`):
            Path of a `Source`.
        token (`str` or `bool`, *optional*):
            Token to read with. It is kept in the object and never becomes part of a path.
        anew (`bool`, *optional*, defaults to `False`):
            Create a new object, for instance because the token may have changed.
    """
    if anew or path not in _folders:
        _folders[path] = HubFolder(path, token)
    return _folders[path]


class HubFolder(RemoteFolder):
    """
    Repository `hub://org/name@commit`. All methods may be called from several threads.

    Raises:
        HubError: From every method, if the Hub refuses, or cannot be reached after several tries.
    """

    _kept_bytes = 0  # over all instances
    _lock = Lock()

    def __init__(self, path: str, token: str | bool | None = None) -> None:
        self.path = path
        self.repo_id, _, self.commit = path.removeprefix(HUB_SCHEME).rpartition("@")
        self._token = token
        self._files: dict[str, RepoFile] | None = None
        self._locations: dict[str, str] = {}  # signed storage URLs that the Hub has redirected us to, by file
        self._small: dict[_Range, bytes] = {}
        self._kept: dict[_Range, NDArray[np.uint8]] = {}

    def names(self, subfolder: str = "") -> list[str]:
        """List the files directly in the repository or in a subfolder of it, sorted."""
        prefix = f"{subfolder}/" if subfolder else ""
        inside = (path.removeprefix(prefix) for path in self._entries() if path.startswith(prefix))
        return sorted(name for name in inside if "/" not in name)

    def subfolders(self) -> list[str]:
        """List the folders directly in the repository, sorted."""
        return sorted({path.partition("/")[0] for path in self._entries() if "/" in path})

    def all_names(self) -> list[str]:
        """List all files, including those in subfolders, sorted."""
        return sorted(self._entries())

    def exists(self, name: str) -> bool:
        """Whether `name` is a file."""
        return name in self._entries()

    def size(self, name: str) -> int:
        """Size of `name` in bytes."""
        return int(self._entries()[name].size)

    def identity(self, name: str) -> str:
        """Return the git blob id of `name`, a hash of its contents."""
        return str(self._entries()[name].blob_id)

    def known_sha256(self, name: str) -> str | None:
        """Return the SHA-256 of `name` if it is known without reading: the Hub lists it for large files."""
        lfs = self._entries()[name].lfs
        return str(lfs.sha256) if lfs else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes `[start, stop)` of `name`; small files and the first bytes of weight files are fetched once."""
        size = self.size(name)
        stop = size if stop is None else min(stop, size)
        if stop <= start:
            return b""
        # Whole small files and the heads of large ones are kept in memory, other ranges are not.
        if stop > _FIRST_BYTES and stop < size:
            return self._fetch(name, start, stop)
        piece = name, 0, size if stop > _FIRST_BYTES else min(_FIRST_BYTES, size)
        if piece not in self._small:
            self._small[piece] = self._fetch(*piece)
        return self._small[piece][start:stop]

    def view(self, name: str, size: int, start: int, stop: int) -> NDArray[np.uint8]:
        """
        Return bytes `[start, stop)` of `name`; read-only uint8, 1-D.

        They are kept until they are released, so that the second pass over a tensor does not fetch them again.
        """
        key = (name, start, stop)
        kept = self._kept.get(key)
        if kept is None:
            data = self._fetch(name, start, stop) if stop > start else b""
            kept = np.frombuffer(data, np.uint8)
            # Another thread may have fetched the same range meanwhile: count its bytes once.
            with self._lock:
                if HubFolder._kept_bytes + kept.size <= _KEPT_BYTES and key not in self._kept:
                    HubFolder._kept_bytes += kept.size
                    self._kept[key] = kept
        return kept

    def release(self, name: str, start: int, stop: int) -> None:
        """Drop the kept ranges inside `[start, stop)`."""
        with self._lock:
            for key in [key for key in self._kept if key[0] == name and start <= key[1] and key[2] <= stop]:
                HubFolder._kept_bytes -= self._kept.pop(key).size

    def close(self) -> None:
        """Drop all kept ranges."""
        for name, _, stop in list(self._kept):
            self.release(name, 0, stop)

    def _fetch(self, name: str, start: int, stop: int) -> bytes:
        """Fetch one range; the client retries after rate limits, server errors and lost connections."""
        # Not by HfFileSystem: it asks the Hub for a new link before every range, which doubles the requests and counts
        # against its rate limit, and it takes a whole file for the range where a server ignores the header.
        from huggingface_hub import hf_hub_url

        with reading_from_hub(self.repo_id, self.commit):
            location = self._locations.get(name)
            data = self._get(location, {}, start, stop) if location else None
            if data is None:  # no location known, or its signature expired
                from huggingface_hub.utils import build_hf_headers

                url = hf_hub_url(self.repo_id, name, revision=self.commit)
                data = self._get(url, build_hf_headers(token=self._token), start, stop, name)
        if data is None or len(data) != stop - start:
            received = "an answer without a range" if data is None else f"{len(data)} bytes"
            raise OSError(
                errno.EIO, f"asked the Hub for {stop - start} bytes of {name} from byte {start}, got {received}"
            )
        return data

    def _get(self, url: str, headers: dict[str, str], start: int, stop: int, name: str | None = None) -> bytes | None:
        from huggingface_hub import constants
        from huggingface_hub.errors import HTTPError
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        response = http_backoff(
            "GET",
            url,
            headers={**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=HTTPError,  # lost connections among them, as clients before 1.23 do not by themselves
            follow_redirects=True,  # to another host without the Authorization header
        )
        if name is None and response.status_code == 403:  # the signature of a kept storage URL has expired
            return None
        hf_raise_for_status(response)
        # Later ranges go to the storage directly and save the redirect. Only a URL that was fetched without our token
        # may be kept: it carries its own signature.
        if name is not None and response.history and "authorization" not in response.request.headers:
            self._locations[name] = str(response.url)
        return response.content

    def _entries(self) -> dict[str, RepoFile]:
        if self._files is None:
            from huggingface_hub import HfApi, RepoFile

            with reading_from_hub(self.repo_id, self.commit):
                tree = HfApi(token=self._token).list_repo_tree(self.repo_id, recursive=True, revision=self.commit)
                self._files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        return self._files
