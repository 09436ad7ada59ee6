"""Routes of an upload: preupload, LFS objects checked by their sha256, the commit."""

from __future__ import annotations

import base64
import hashlib
import json

from hub_server.handler import API, ID, Answer, Handler, Refusal, as_json, route
from hub_server.state import LFS_SIZE, LFS_SUFFIXES, Blob


@route("POST", rf"{API}/preupload/(?P<revision>[^/]+)")
def preupload(request: Handler, parts: dict[str, str]) -> Answer:
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
    return as_json({"files": answers})


@route("POST", rf"(/(?P<kind>datasets))?/{ID}\.git/info/lfs/objects/batch")
def lfs_batch(request: Handler, parts: dict[str, str]) -> Answer:
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
    return as_json({"transfer": "basic", "objects": objects})


@route("PUT", r"/lfs-storage/(?P<oid>[0-9a-f]{64})")
def lfs_put(request: Handler, parts: dict[str, str]) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != parts["oid"]:
        raise Refusal(400, "The content does not have the announced sha256")
    request.hub.lfs[parts["oid"]] = request.body
    return Answer()


@route("POST", r"/api/lfs-verify/(?P<oid>[0-9a-f]{64})")
def lfs_verify(request: Handler, parts: dict[str, str]) -> Answer:
    stored = request.hub.lfs.get(parts["oid"])
    if stored is None or len(stored) != json.loads(request.body)["size"]:
        raise Refusal(422, "The object was not stored whole")
    return Answer()


@route("POST", rf"{API}/commit/(?P<revision>[^/]+)")
def commit(request: Handler, parts: dict[str, str]) -> Answer:
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
    return as_json(answer)
