"""Routes of a download: trees, and files with ETags and byte ranges, large ones from another host."""

from __future__ import annotations

import hashlib
import json
import re
from urllib.parse import parse_qs, urlencode

from hub_server.handler import API, ID, Answer, Handler, Refusal, as_json, route
from hub_server.state import Blob


def _tree_entry(path: str, blob: Blob) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": blob.git_oid, "size": len(blob.data), "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


@route("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
def tree(request: Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.readable(parts["kind"], parts["id"], request.user)
    files = request.hub.commit_at(repo, parts["revision"]).files
    prefix = f"{parts['folder']}/" if parts["folder"] else ""
    inside = {name: blob for name, blob in sorted(files.items()) if name.startswith(prefix)}
    if prefix and not inside:
        raise Refusal(404, f"{parts['folder']} does not exist on {parts['revision']}", "EntryNotFound")
    if request.query.get("recursive") == ["true"]:
        return _page(request, [_tree_entry(name, blob) for name, blob in inside.items()])
    entries: dict[str, dict[str, object]] = {}
    for name, blob in inside.items():
        first, _, deeper = name.removeprefix(prefix).partition("/")
        oid = hashlib.sha1(f"tree {prefix}{first}".encode()).hexdigest()
        folder = {"type": "directory", "oid": oid, "size": 0, "path": prefix + first}
        entries[first] = folder if deeper else _tree_entry(name, blob)
    return _page(request, list(entries.values()))


def _page(request: Handler, entries: list[dict[str, object]]) -> Answer:
    """The part of a listing that the cursor asks for, with a link to the next."""
    start = int(request.query.get("cursor", ["0"])[0])
    stop = start + request.hub.page_size
    answer = as_json(entries[start:stop])
    if stop < len(entries):
        query = {name: values[0] for name, values in request.query.items()} | {"cursor": stop}
        address = f"{request.hub.endpoint}{request.path.partition('?')[0]}?{urlencode(query)}"
        answer.headers["Link"] = f'<{address}>; rel="next"'
    return answer


@route("POST", rf"{API}/paths-info/(?P<revision>[^/]+)")
def paths_info(request: Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.readable(parts["kind"], parts["id"], request.user)
    files = request.hub.commit_at(repo, parts["revision"]).files
    if request.request_headers.get("content-type", "").startswith("application/json"):
        paths = json.loads(request.body)["paths"]
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    return as_json([_tree_entry(path, files[path]) for path in paths if path in files])


@route("GET", rf"(/(?P<kind>datasets))?/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request: Handler, parts: dict[str, str]) -> Answer:
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
def lfs_get(request: Handler, parts: dict[str, str]) -> Answer:
    data = request.hub.lfs.get(parts["oid"])
    if data is None:
        raise Refusal(404, "No such object")
    return _ranged(request, data, {"ETag": f'"{parts["oid"]}"', "Accept-Ranges": "bytes"})


def _ranged(request: Handler, data: bytes, headers: dict[str, str]) -> Answer:
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
