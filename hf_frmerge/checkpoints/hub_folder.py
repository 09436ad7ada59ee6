"""Files of a Hub repository, read by byte ranges: a plan needs headers and configs, not weights."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.files import RemoteFolder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SCHEME = "hub://"


class HubFolder(RemoteFolder):
    """
    Repository `hub://org/name@commit`, with the token that `hf auth login` stored.

    Only for plans: a merge downloads what it reads twice.
    """

    def __init__(self, path: str) -> None:
        from huggingface_hub import HfApi

        self.path = path
        self._repo_id, _, self._commit = path.removeprefix(SCHEME).rpartition("@")
        self._api: HfApi = HfApi()
        self._files: dict[str, Any] | None = None

    def names(self, subfolder: str = "") -> list[str]:
        """Names of the files directly in the repository or in a subfolder of it, sorted."""
        prefix = f"{subfolder}/" if subfolder else ""
        inside = (path.removeprefix(prefix) for path in self._entries() if path.startswith(prefix))
        return sorted(name for name in inside if "/" not in name)

    def exists(self, name: str) -> bool:
        """Whether `name` is a file."""
        return name in self._entries()

    def size(self, name: str) -> int:
        """Size of `name` in bytes."""
        return int(self._entries()[name].size)

    def identity(self, name: str) -> str:
        """Hash of the contents of `name`."""
        return str(self._entries()[name].blob_id)

    def known_sha256(self, name: str) -> str | None:
        """SHA-256 of `name` where it is known without reading: the Hub tells that of large files."""
        lfs = self._entries()[name].lfs
        return str(lfs.sha256) if lfs else None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `[start, stop)` of `name`, by one ranged request."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        end = (self.size(name) if stop is None else stop) - 1
        if end < start:
            return b""
        url = hf_hub_url(self._repo_id, name, revision=self._commit, endpoint=self._api.endpoint)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end}"}
        try:
            response = get_session().get(url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
        except Exception as error:
            # The client's own errors are not OSErrors; to a reader they all mean that the file did not come.
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
        return bytes(response.content)

    def _entries(self) -> dict[str, Any]:
        if self._files is None:
            tree = self._api.list_repo_tree(self._repo_id, recursive=True, revision=self._commit)
            self._files = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
        return self._files
