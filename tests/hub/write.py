"""What is written to a Hub: repositories, files, commits."""

import base64
import hashlib
import json
import math
import re
from typing import Any

import yaml

from .server import Answer, Hub, Request
from .store import Blob, Refused, Repo, git_oid, is_large, pointer

CHUNK = 1_000_000  # greater files are uploaded in parts
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def create(hub: Hub, request: Request) -> Answer:
    asked = request.json()
    namespace, short = asked.get("organization") or request.user, asked["name"]
    name = f"{namespace}/{short}"
    if request.user is None:
        raise Refused(401, message="Invalid username or password.")
    if not hub.store.may_write(request.user, namespace) or request.token in {*hub.store.read_only, *hub.store.bound}:
        raise Refused(403, message=f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if not NAME.fullmatch(short):
        raise Refused(400, message="Invalid repository name")
    document = {"url": f"{hub.url}/{name}", "name": name, "id": "0"}
    if name in hub.store.repos:
        return Answer.of({**document, "error": "You already created this model repo"}, 409)
    hub.store.create(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    return Answer.of(document)


def delete(hub: Hub, request: Request) -> Answer:
    asked = request.json()
    name = f"{asked.get('organization') or request.user}/{asked['name']}"
    _writable(hub, request, name)
    del hub.store.repos[name]
    return Answer.of({})


def settings(hub: Hub, request: Request, name: str) -> Answer:
    repo, asked = _writable(hub, request, name), request.json()
    if "gated" in asked:
        repo.gated = asked["gated"]
    if "visibility" in asked or "private" in asked:
        repo.private = asked.get("visibility") == "private" or asked.get("private") is True
    return Answer.of({})


def validate_yaml(hub: Hub, request: Request) -> Answer:
    """The metadata of a card: a mapping, with what the Hub requires of the keys used here."""
    found = re.match(r"---\n(.*?)\n---(\n|$)", request.json()["content"], re.DOTALL)
    if not found:
        return Answer.of({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    try:
        data = yaml.safe_load(found[1])
        errors = _mistakes(data) if isinstance(data, dict) else ["the metadata is not a mapping"]
    except yaml.YAMLError as error:
        errors = [str(error)]
    document = {"errors": [{"message": message} for message in errors], "warnings": []}
    return Answer.of(document, 400 if errors else 200)


def _mistakes(data: dict[str, Any]) -> list[str]:
    errors = [f'"{key}" must be a string' for key in ("license", "library_name", "pipeline_tag", "license_name")
              if not isinstance(data.get(key, ""), str)]  # fmt: skip
    if not all(isinstance(tag, str) and tag for tag in data.get("tags", [])):
        errors.append('"tags" must be a list of words')
    bases = data.get("base_model", [])
    if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)) for base in (bases if isinstance(bases, list) else [bases])):
        errors.append('"base_model" must be an id or a list of ids')
    if data.get("base_model_relation", "quantized") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" is unknown')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required where the license is other')
    for entry in data.get("model-index", []):
        for result in entry.get("results", [{}]):
            if not result.get("task", {}).get("type") or not result.get("dataset", {}).get("type"):
                errors.append('"model-index" results need a task and a dataset')
            if not all(isinstance(m.get("value"), int | float) and m.get("type") for m in result.get("metrics", [{}])):
                errors.append('"model-index" metrics need a type and a value')
    return errors


def preupload(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repo = _writable(hub, request, name, revision, "create_pr" in request.query)
    files = repo.resolve(revision).files
    answers = []
    for file in request.json()["files"]:
        known = files.get(file["path"])
        oid = None if known is None else known.sha256 if known.large else known.oid
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Answer.of({"files": answers, "commitOid": repo.resolve(revision).sha})


def xet_token(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    _writable(hub, request, name, None if revision == "None" else revision)
    return hub.xet_token()


def batch(hub: Hub, request: Request, name: str) -> Answer:
    """Where to put large files, in parts if they are greater than CHUNK; nothing for those that are there."""
    asked = request.json()
    repo = _writable(hub, request, name, asked.get("ref", {}).get("name", "main"))
    objects: list[dict[str, Any]] = []
    for file in asked["objects"]:
        oid, size = file["oid"], file["size"]
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in repo.uploaded:
            href, header = f"{hub.url}/lfs/put/{name}/{oid}", {}
            if size > CHUNK:
                href = f"{hub.url}/lfs/complete/{name}/{oid}"
                parts = {str(i + 1): f"{hub.url}/lfs/part/{name}/{oid}/{i + 1}" for i in range(math.ceil(size / CHUNK))}
                header = {"chunk_size": str(CHUNK), **parts}
            verify = {"href": f"{hub.url}/lfs/verify/{name}/{oid}"}
            entry["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
        objects.append(entry)
    return Answer.of({"transfer": "basic", "objects": objects})


def lfs(hub: Hub, request: Request) -> Answer:
    """Large files and their parts come in.  What does not have its name's hash is refused."""
    action, oid = request.parts[1], request.parts[4]
    repo = hub.store.repos["/".join(request.parts[2:4])]
    if not re.fullmatch(r"[0-9a-f]{64}", oid):
        raise Refused(400, message="not a sha256")
    if action == "part":
        (hub.store.folder / f"{oid}.{request.parts[5]}").write_bytes(request.body)
        return Answer(200, b"", {"ETag": f'"{hashlib.sha256(request.body).hexdigest()}"'})
    if action == "verify":
        stored = hub.store.stored(oid)
        if stored is None or stored.stat().st_size != request.json()["size"]:
            raise Refused(404, message="the object is not there")
        return Answer.of({})
    content = request.body
    if action == "complete":
        paths = [hub.store.folder / f"{oid}.{part['partNumber']}" for part in request.json()["parts"]]
        content = b"".join(path.read_bytes() for path in paths)
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refused(400, message="the content does not have this hash")
    hub.store.put(content, True)
    repo.uploaded.add(oid)
    return Answer.of({})


def commit(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    new_pr = "create_pr" in request.query
    repo = _writable(hub, request, name, revision, new_pr)
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    before = repo.resolve(revision).files
    changes: dict[str, Blob | None] = {}
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            changes[value["path"]] = hub.store.put(base64.b64decode(value["content"]), False)
        elif line["key"] == "lfsFile":
            changes[value["path"]] = _large(hub, repo, value["oid"])
        elif line["key"] == "deletedFile":
            if value["path"] not in before:
                raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
            changes.setdefault(value["path"], None)
        elif line["key"] == "deletedFolder":
            changes |= {path: None for path in before if path.startswith(value["path"].rstrip("/") + "/")}
    ref, found = "", None
    if new_pr:
        from .talk import open_pull_request

        found = open_pull_request(repo, header["summary"], str(request.user), revision)
        ref = f"refs/pr/{found.num}"
    made = repo.commit(
        ref or repo.ref(revision), header["summary"], str(request.user), changes, header.get("parentCommit")
    )
    url = f"{hub.url}/{name}/discussions/{found.num}" if found else None
    return Answer.of({
        "success": True, "commitOid": made.sha, "commitUrl": f"{hub.url}/{name}/commit/{made.sha}",
        "pullRequestUrl": url,
    })  # fmt: skip


def _large(hub: Hub, repo: Repo, sha256: str) -> Blob:
    path = hub.store.stored(sha256) if sha256 in repo.uploaded else hub.xet.fetch(sha256, hub.store.folder)
    if path is None:
        raise Refused(400, message=f"the large file {sha256} was not uploaded")
    size = path.stat().st_size
    return Blob(sha256, git_oid(pointer(sha256, size)), size, True)


def branch(hub: Hub, request: Request, name: str, new: str) -> Answer:
    repo = _writable(hub, request, name)
    if f"refs/heads/{new}" in repo.refs:
        raise Refused(409, message="Reference already exists")
    repo.refs[f"refs/heads/{new}"] = repo.resolve((request.json() or {}).get("startingPoint") or "main").sha
    return Answer.of({})


def tag(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repo = _writable(hub, request, name)
    ref = f"refs/tags/{request.json()['tag']}"
    if ref in repo.refs:
        raise Refused(409, message="Reference already exists")
    repo.refs[ref] = repo.resolve(revision).sha
    return Answer.of({})


def _writable(hub: Hub, request: Request, name: str, revision: str | None = None, new_pr: bool = False) -> Repo:
    """The repository, if this user may write to it there.  To a pull request of their own everybody may."""
    hub.store.check_token(request.token, name)
    if new_pr and request.user:
        return hub.store.readable(name, request.user)
    if revision and revision.startswith("refs/pr/"):
        repo = hub.store.readable(name, request.user)
        if any(f"refs/pr/{pr.num}" == revision and pr.author == request.user for pr in repo.discussions):
            return repo
    return hub.store.writable(name, request.user)
