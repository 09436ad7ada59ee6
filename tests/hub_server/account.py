"""Routes of accounts, repositories, branches and collections."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from hub_server.handler import API, Answer, Handler, Refusal, as_json, route
from hub_server.state import Collection, Commit


@route("GET", r"/api/whoami-v2")
def whoami(request: Handler, parts: dict[str, str]) -> Answer:
    user = request.user
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    role = "write" if user.can_write else "read"
    return as_json(
        {
            "type": "user",
            "name": user.name,
            "orgs": [{"name": name} for name in user.organisations],
            "auth": {"accessToken": {"displayName": "test", "role": role}},
        }
    )


@route("POST", r"/api/repos/create")
def create_repo(request: Handler, parts: dict[str, str]) -> Answer:
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
        return as_json({"error": "You already created this repo", **url}, 409)
    private = wanted.get("visibility") == "private" or wanted.get("private", False)  # the new name and the old
    request.hub.add_repo(repo_id, kind=kind, private=private)
    return as_json(url)


@route("POST", r"/api/validate-yaml")
def validate_yaml(request: Handler, parts: dict[str, str]) -> Answer:
    import yaml

    content = json.loads(request.body)["content"]
    match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    errors = []
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
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
    return as_json({"errors": [{"message": message} for message in errors], "warnings": []}, status)


@route("GET", rf"{API}(/revision/(?P<revision>[^/]+))?")
def repo_info(request: Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.readable(parts["kind"], parts["id"], request.user)
    commit = request.hub.commit_at(repo, parts["revision"] or "main")
    data = _front_matter(commit)
    return as_json(
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


@route("GET", rf"{API}/refs")
def refs(request: Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.readable(parts["kind"], parts["id"], request.user)
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in repo.branches.items()]
    requests = [{"name": n, "ref": n, "targetCommit": oid} for n, oid in repo.pull_requests.items()]
    return as_json({"branches": branches, "converts": [], "tags": [], "pullRequests": requests})


@route("POST", rf"{API}/branch/(?P<branch>[^/]+)")
def create_branch(request: Handler, parts: dict[str, str]) -> Answer:
    repo = request.hub.writable(parts["kind"], parts["id"], request.user)
    if parts["branch"] in repo.branches:
        raise Refusal(409, f"Reference already exists: {parts['branch']}")
    start = json.loads(request.body or b"{}").get("startingPoint", "main")
    repo.branches[parts["branch"]] = request.hub.commit_at(repo, start).oid
    return as_json({})


# Collections


@route("GET", r"/api/collections/(?P<slug>[\w-]+/[\w-]+)")
def get_collection(request: Handler, parts: dict[str, str]) -> Answer:
    if parts["slug"] not in request.hub.collections:
        raise Refusal(404, "Collection not found")
    return as_json(_described(request.hub.collections[parts["slug"]]))


@route("POST", r"/api/collections/(?P<slug>[\w-]+/[\w-]+)/items")
def add_to_collection(request: Handler, parts: dict[str, str]) -> Answer:
    user, collection = request.user, request.hub.collections.get(parts["slug"])
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    if collection is None:
        raise Refusal(404, "Collection not found")
    request.hub.check_may_write(user, parts["slug"].split("/")[0])
    item = json.loads(request.body)["item"]
    if item in collection.items:
        raise Refusal(409, "This item is already in the collection")
    request.hub.readable("models", item["id"], user)
    collection.items.append(item)
    return as_json(_described(collection))


def _described(collection: Collection) -> dict[str, object]:
    owner, title = collection.slug.split("/")
    items = [{"_id": str(index), "position": index, **item} for index, item in enumerate(collection.items)]
    return {
        "slug": collection.slug,
        "title": title,
        "owner": {"name": owner},
        "items": items,
        "lastUpdated": "2026-01-01T00:00:00.000Z",
        "position": 0,
        "private": False,
        "theme": "blue",
        "upvotes": 0,
    }
