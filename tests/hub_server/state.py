"""What the Hub keeps: repositories with commits and branches, blobs, users."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

ALICE_TOKEN = "token-of-alice"  # of the user the `hub` fixture makes
LFS_SUFFIXES = (".safetensors", ".bin", ".h5", ".gguf", ".onnx", ".pt", ".parquet")
LFS_SIZE = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )

    @property
    def git_oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    kind: str  # "models" or "datasets"
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)  # users let through the gate
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.pull_requests.get(revision) or revision
        return self.commits.get(oid)

    def add_commit(self, parent: Commit | None, title: str, files: dict[str, Blob]) -> Commit:
        # Like git's, an id stands for the content: caches may keep what they have under it.
        contents = sorted((name, blob.etag) for name, blob in files.items())
        seed = f"{self.id} {len(self.commits)} {title} {parent.oid if parent else ''} {contents}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent.oid if parent else None, title, files)
        self.commits[commit.oid] = commit
        return commit


@dataclass(frozen=True)
class User:
    name: str
    token: str
    can_write: bool
    organisations: tuple[str, ...]


@dataclass
class Collection:
    slug: str
    items: list[dict[str, str]] = field(default_factory=list)
