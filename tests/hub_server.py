"""A Hugging Face Hub for tests: the requests of the real client, answered by the standard library alone.

It keeps what the real Hub keeps that matters to a push or a pull: commits and branches, LFS objects addressed and
checked by their sha256, ETags and byte ranges, downloads of large files from another host, private and gated
repositories, error codes, rate limits. Every request is logged; faults can be ordered. It is one long file on
purpose: read from top to bottom, it is the list of what the client asks.

```python
server = HubServer().start()
server.add_user("alice", "alice-token")
server.fail("POST", r"/commit/", status=500)      # the next commit fails
```
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

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


@dataclass(frozen=True)
class LoggedRequest:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    status: int | None  # None: the connection was dropped


@dataclass
class Fault:
    method: str
    pattern: re.Pattern[str]
    status: int | None  # None: drop the connection
    times: int
    headers: dict[str, str]
    after_bytes: int | None  # send so much of the true answer, then drop


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubServer:
    """The Hub's state, and the server in front of it."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users: dict[str, User] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[LoggedRequest] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._httpd: ThreadingHTTPServer | None = None

    def start(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
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
            for store in (self.repos, self.users, self.lfs, self.requests, self.faults):
                store.clear()

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

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        times: int = 1,
        headers: dict[str, str] | None = None,
        after_bytes: int | None = None,
    ) -> None:
        """Let the next `times` requests that match fail: with `status`, or by dropping the connection."""
        self.faults.append(Fault(method, re.compile(pattern), status, times, headers or {}, after_bytes))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.pattern.search(path):
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


Route = Callable[["_Handler", dict[str, str]], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    def add(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass  # the request log takes its place

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        self.request_headers = {name.lower(): value for name, value in self.headers.items()}
        self.body = self._read_body()
        fault = self.hub.take_fault(self.command, self.path)
        if fault is not None and fault.status is None and fault.after_bytes is None:
            self._log(None)
            self.close_connection = True
            return
        if fault is not None and fault.status is not None:
            answer = _as_answer(Refusal(fault.status, "Ordered failure", headers=fault.headers))
        else:
            answer = self._answer()
        self._log(answer.status)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.after_bytes is not None:
            self.wfile.write(answer.body[: fault.after_bytes])
            self.close_connection = True
            return
        self.wfile.write(answer.body)

    def _answer(self) -> Answer:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, function in ROUTES:
            match = pattern.fullmatch(url.path) if wanted == method else None
            if match:
                parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
                try:
                    with self.hub.lock:
                        return function(self, parts)
                except Refusal as refusal:
                    return _as_answer(refusal)
        return Answer(b'{"error":"Sorry, we can\'t find the page you are looking for."}', 404)

    def _read_body(self) -> bytes:
        if self.request_headers.get("transfer-encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.request_headers.get("content-length", 0)))

    def _log(self, status: int | None) -> None:
        with self.hub.lock:
            self.hub.requests.append(LoggedRequest(self.command, self.path, self.request_headers, self.body, status))

    @property
    def user(self) -> User | None:
        return self.hub.user_of(self.request_headers)


def _as_answer(refusal: Refusal) -> Answer:
    return Answer(json.dumps({"error": refusal.message}).encode(), refusal.status, refusal.headers)


def _json(value: object, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


# Account and repositories


@route("GET", r"/api/whoami-v2")
def whoami(request: _Handler, parts: dict[str, str]) -> Answer:
    user = request.user
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    role = "write" if user.can_write else "read"
    return _json(
        {
            "type": "user",
            "name": user.name,
            "orgs": [{"name": name} for name in user.organisations],
            "auth": {"accessToken": {"displayName": "test", "role": role}},
        }
    )


@route("POST", r"/api/repos/create")
def create_repo(request: _Handler, parts: dict[str, str]) -> Answer:
    user = request.user
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    wanted = json.loads(request.body)
    namespace = wanted.get("organization") or user.name
    request.hub.check_may_write(user, namespace)
    kind = wanted.get("type", "model") + "s"
    repo_id = f"{namespace}/{wanted['name']}"
    url = {"url": f"{request.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"}
    if (kind, repo_id) in request.hub.repos:
        return _json({"error": "You already created this repo", **url}, 409)
    request.hub.add_repo(repo_id, kind=kind, private=wanted.get("visibility") == "private")
    return _json(url)


@route("POST", r"/api/validate-yaml")
def validate_yaml(request: _Handler, parts: dict[str, str]) -> Answer:
    import yaml

    content = json.loads(request.body)["content"]
    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    errors = []
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    parents = data.get("base_model") or []
    for parent in parents if isinstance(parents, list) else [parents]:
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", parent):
            errors.append(
                f'"base_model" with value "{parent}" is not valid. Use a model id from https://hf.co/models.'
            )
    if data.get("base_model_relation", "merge") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required')
    status = 400 if errors else 200
    return _json({"errors": [{"message": message} for message in errors], "warnings": []}, status)


@route("GET", rf"{_API}(/revision/(?P<revision>[^/]+))?")
def repo_info(request: _Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.readable(parts["kind"], parts["id"], request.user)
    commit = request.hub.commit_at(repo, parts["revision"] or "main")
    data = _front_matter(commit)
    return _json(
        {
            "_id": hashlib.md5(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "tags": data.get("tags", []),
            "pipeline_tag": data.get("pipeline_tag"),
            "library_name": data.get("library_name"),
            "cardData": data,
            "siblings": [{"rfilename": name} for name in sorted(commit.files)],
        }
    )


def _front_matter(commit: Commit) -> dict[str, Any]:
    import yaml

    readme = commit.files.get("README.md")
    match = re.match(r"---\r?\n(.*?)\r?\n---", readme.data.decode(), re.DOTALL) if readme else None
    return (yaml.safe_load(match[1]) or {}) if match else {}


# Branches


@route("GET", rf"{_API}/refs")
def refs(request: _Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.readable(parts["kind"], parts["id"], request.user)
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
    requests = [{"name": n, "ref": n, "targetCommit": oid} for n, oid in repo.pull_requests.items()]
    return _json({"branches": branches, "converts": [], "tags": [], "pullRequests": requests})


@route("POST", rf"{_API}/branch/(?P<branch>[^/]+)")
def create_branch(request: _Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.writable(parts["kind"], parts["id"], request.user)
    if parts["branch"] in repo.branches:
        raise Refusal(409, f"Reference already exists: {parts['branch']}")
    start = json.loads(request.body or b"{}").get("startingPoint", "main")
    repo.branches[parts["branch"]] = request.hub.commit_at(repo, start).oid
    return _json({})


# Upload


@route("POST", rf"{_API}/preupload/(?P<revision>[^/]+)")
def preupload(request: _Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.writable(parts["kind"], parts["id"], request.user)
    files = request.hub.commit_at(repo, parts["revision"]).files
    answers = []
    for wanted in json.loads(request.body)["files"]:
        path = wanted["path"]
        is_large = path.endswith(LFS_SUFFIXES) or wanted["size"] > LFS_SIZE
        answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
        if path in files:
            answer["oid"] = files[path].etag
        answers.append(answer)
    return _json({"files": answers})


@route("POST", rf"(/(?P<kind>datasets))?/{_ID}\.git/info/lfs/objects/batch")
def lfs_batch(request: _Handler, parts: dict[str, str]) -> Answer:
    request.hub.writable(parts["kind"] or "models", parts["id"], request.user)
    objects = []
    for wanted in json.loads(request.body)["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in request.hub.lfs:
            entry["actions"] = {
                "upload": {"href": f"{request.hub.storage}/lfs-storage/{wanted['oid']}"},
                "verify": {"href": f"{request.hub.endpoint}/api/lfs-verify/{wanted['oid']}"},
            }
        objects.append(entry)
    return _json({"transfer": "basic", "objects": objects})


@route("PUT", r"/lfs-storage/(?P<oid>[0-9a-f]{64})")
def lfs_put(request: _Handler, parts: dict[str, str]) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != parts["oid"]:
        raise Refusal(400, "The content does not have the announced sha256")
    request.hub.lfs[parts["oid"]] = request.body
    return Answer()


@route("POST", r"/api/lfs-verify/(?P<oid>[0-9a-f]{64})")
def lfs_verify(request: _Handler, parts: dict[str, str]) -> Answer:
    stored = request.hub.lfs.get(parts["oid"])
    if stored is None or len(stored) != json.loads(request.body)["size"]:
        raise Refusal(422, "The object was not stored whole")
    return Answer()


@route("POST", rf"{_API}/commit/(?P<revision>[^/]+)")
def commit(request: _Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.writable(parts["kind"], parts["id"], request.user)
    parent = request.hub.commit_at(repo, parts["revision"])
    files = dict(parent.files)
    title = ""
    for line in request.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, parent.oid):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in request.hub.lfs:
                raise Refusal(400, f"The LFS object of {value['path']} was not uploaded")
            files[value["path"]] = Blob(request.hub.lfs[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            files = {
                name: blob for name, blob in files.items() if not name.startswith(value["path"].rstrip("/") + "/")
            }
        else:
            raise Refusal(400, f"Unknown operation {key}")
    new = repo.add_commit(parent, title, files)
    answer = {"success": True, "commitOid": new.oid, "commitUrl": f"{request.hub.endpoint}/{repo.id}/commit/{new.oid}"}
    if request.query.get("create_pr") == ["1"]:
        number = len(repo.pull_requests) + 1
        repo.pull_requests[f"refs/pr/{number}"] = new.oid
        answer["pullRequestUrl"] = f"{request.hub.endpoint}/{repo.id}/discussions/{number}"
    elif parts["revision"] in repo.branches:
        repo.branches[parts["revision"]] = new.oid
    else:
        repo.pull_requests[parts["revision"]] = new.oid
    return _json(answer)


# Download


def _tree_entry(path: str, blob: Blob) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": blob.git_oid, "size": len(blob.data), "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


@route("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
def tree(request: _Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.readable(parts["kind"], parts["id"], request.user)
    files = request.hub.commit_at(repo, parts["revision"]).files
    prefix = f"{parts['folder']}/" if parts["folder"] else ""
    inside = {name: blob for name, blob in sorted(files.items()) if name.startswith(prefix)}
    if prefix and not inside:
        raise Refusal(404, f"{parts['folder']} does not exist on {parts['revision']}", "EntryNotFound")
    if request.query.get("recursive") == ["true"]:
        return _json([_tree_entry(name, blob) for name, blob in inside.items()])
    entries: dict[str, dict[str, object]] = {}
    for name, blob in inside.items():
        first, _, deeper = name.removeprefix(prefix).partition("/")
        oid = hashlib.sha1(f"tree {prefix}{first}".encode()).hexdigest()
        folder = {"type": "directory", "oid": oid, "size": 0, "path": prefix + first}
        entries[first] = folder if deeper else _tree_entry(name, blob)
    return _json(list(entries.values()))


@route("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)")
def paths_info(request: _Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.readable(parts["kind"], parts["id"], request.user)
    files = request.hub.commit_at(repo, parts["revision"]).files
    if request.request_headers.get("content-type", "").startswith("application/json"):
        paths = json.loads(request.body)["paths"]
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    return _json([_tree_entry(path, files[path]) for path in paths if path in files])


@route("GET", rf"(/(?P<kind>datasets))?/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: _Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.readable(parts["kind"] or "models", parts["id"], request.user)
    request.hub.check_gate(repo, request.user)
    commit = request.hub.commit_at(repo, parts["revision"])
    blob = commit.files.get(parts["path"])
    if blob is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
    if not blob.lfs:
        return _ranged(request, blob.data, headers)
    linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
    location = f"{request.hub.storage}/lfs-storage/{blob.sha256}?X-Amz-Signature=test"
    return Answer(b"", 302, {**headers, **linked, "Location": location})


@route("GET", r"/lfs-storage/(?P<oid>[0-9a-f]{64})")
def lfs_get(request: _Handler, parts: dict[str, str]) -> Answer:
    data = request.hub.lfs.get(parts["oid"])
    if data is None:
        raise Refusal(404, "No such object")
    return _ranged(request, data, {"ETag": f'"{parts["oid"]}"', "Accept-Ranges": "bytes"})


def _ranged(request: _Handler, data: bytes, headers: dict[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.request_headers.get("range", ""))
    if match is None or match[0] == "bytes=-":
        return Answer(data, 200, {**headers, "Content-Length": str(len(data))})
    if match[1]:
        start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else len(data), len(data))
    else:  # the last bytes of the file
        start, stop = max(len(data) - int(match[2]), 0), len(data)
    if start >= len(data):
        raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    part = data[start:stop]
    headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", "Content-Length": str(len(part))}
    return Answer(part, 206, headers)
