"""The Hub's state, its users' rights, and the server in front of it."""

from __future__ import annotations

import re
import threading
from http.server import ThreadingHTTPServer

from hub_server.handler import Fault, Handler, LoggedRequest, Refusal
from hub_server.state import GITATTRIBUTES, LFS_SUFFIXES, Blob, Collection, Commit, Repo, User


class HubServer:
    """The Hub's state, and the server in front of it."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users: dict[str, User] = {}
        self.lfs: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}  # old id -> new id
        self.collections: dict[str, Collection] = {}
        self.page_size = 1000  # entries of a tree in one answer
        self.requests: list[LoggedRequest] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._httpd: ThreadingHTTPServer | None = None

    def start(self) -> HubServer:
        handler = type("Handler", (Handler,), {"hub": self})
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._httpd.daemon_threads = True
        threading.Thread(target=self._httpd.serve_forever, name="hub-server", daemon=True).start()
        return self

    def stop(self) -> None:
        if self._httpd is not None:
            self._httpd.shutdown()
            self._httpd.server_close()

    @property
    def port(self) -> int:
        assert self._httpd is not None
        return self._httpd.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Where large files live: for the client another host, which must not see the token."""
        return f"http://localhost:{self.port}"

    def reset(self) -> None:
        """Forget everything but stay on the same port."""
        with self.lock:
            for store in (self.repos, self.users, self.lfs, self.moved, self.collections, self.requests, self.faults):
                store.clear()
            self.page_size = 1000

    def add_user(self, name: str, token: str, *, can_write: bool = True, organisations: tuple[str, ...] = ()) -> User:
        user = self.users[token] = User(name, token, can_write, organisations)
        return user

    def add_repo(
        self,
        repo_id: str,
        files: dict[str, bytes] | None = None,
        *,
        kind: str = "models",
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """Create a repository, with `files` as its second commit."""
        repo = Repo(repo_id, kind, private, gated)
        first = repo.add_commit(None, "initial commit", {".gitattributes": Blob(GITATTRIBUTES, False)})
        repo.branches["main"] = first.oid
        if files:
            blobs = {name: Blob(data, name.endswith(LFS_SUFFIXES)) for name, data in files.items()}
            self.lfs.update({blob.sha256: blob.data for blob in blobs.values() if blob.lfs})
            repo.branches["main"] = repo.add_commit(first, "Add files", {**first.files, **blobs}).oid
        self.repos[kind, repo_id] = repo
        return repo

    def rename(self, old_id: str, new_id: str) -> None:
        """Move a model; requests for the old id are redirected."""
        repo = self.repos.pop(("models", old_id))
        repo.id = new_id
        self.repos["models", new_id] = repo
        self.moved[old_id] = new_id

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        times: int = 1,
        headers: dict[str, str] | None = None,
        after_bytes: int | None = None,
        skip: int = 0,
        hold: threading.Event | None = None,
    ) -> None:
        """Let `times` requests that match fail, after `skip` of them: with `status`, or by dropping the connection."""
        self.faults.append(Fault(method, re.compile(pattern), status, times, headers or {}, after_bytes, skip, hold))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.pattern.search(path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def sent(self, method: str, pattern: str) -> list[LoggedRequest]:
        """Logged requests of one method whose path matches."""
        return [request for request in self.requests if request.method == method and re.search(pattern, request.path)]

    # Who may do what

    def user_of(self, headers: dict[str, str]) -> User | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def readable(self, kind: str, repo_id: str, user: User | None) -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self._owns(user, repo_id)):
            # The real Hub does not tell a missing repository from a hidden one, and tells the anonymous to log in.
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, kind: str, repo_id: str, user: User | None) -> Repo:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo = self.readable(kind, repo_id, user)
        self.check_may_write(user, repo_id.split("/")[0])
        return repo

    def check_may_write(self, user: User, namespace: str) -> None:
        if not user.can_write or namespace not in (user.name, *user.organisations):
            raise Refusal(403, f"You don't have the rights to write in the namespace {namespace}")

    def check_gate(self, repo: Repo, user: User | None) -> None:
        if repo.gated and not self._owns(user, repo.id) and (user is None or user.name not in repo.granted):
            advice = "log in" if user is None else "ask for access"
            raise Refusal(401 if user is None else 403, f"Access to {repo.id} is restricted; {advice}.", "GatedRepo")

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.commit_of(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    @staticmethod
    def _owns(user: User | None, repo_id: str) -> bool:
        return user is not None and repo_id.split("/")[0] in (user.name, *user.organisations)
