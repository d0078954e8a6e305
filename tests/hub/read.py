"""What is read from a Hub: who am I, what is in a repository, its files."""

import re
from collections.abc import Mapping
from typing import Any

from .server import Answer, Hub, Request
from .store import DATE, Blob, Refused, Repo


def whoami(hub: Hub, request: Request) -> Answer:
    if request.user is None or request.token in hub.store.bound:
        raise Refused(401, message="Invalid username or password.")
    role = "read" if request.token in hub.store.read_only else "write"
    orgs = [
        {"type": "org", "name": name, "roleInOrg": "write"} for name, of in hub.store.orgs.items() if request.user in of
    ]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return Answer.of({"type": "user", "name": request.user, "orgs": orgs, "auth": token})


def models(hub: Hub, request: Request) -> Answer:
    author, search = request.query.get("author"), request.query.get("search", "")
    found = [
        {"id": name, "modelId": name, "private": repo.private, "downloads": repo.downloads, **_counted(repo)}
        for name, repo in hub.store.repos.items()
        if search in name and author in (None, name.partition("/")[0])
    ]
    if request.query.get("sort") == "downloads":
        found.sort(key=lambda model: -model["downloads"])
    return Answer.of(found[: int(request.query.get("limit", len(found)))])


def _counted(repo: Repo) -> dict[str, Any]:
    return {} if repo.parameters is None else {"safetensors": {"parameters": {}, "total": repo.parameters}}


def info(hub: Hub, request: Request, name: str, revision: str = "main") -> Answer:
    repo = hub.store.readable(name, request.user)
    commit = repo.resolve(revision)
    sizes = "blobs" in request.query
    return Answer.of(
        {
            "_id": "0", "id": name, "modelId": name, "author": name.partition("/")[0], "sha": commit.sha,
            "private": repo.private, "gated": repo.gated, "disabled": False, "lastModified": DATE, "createdAt": DATE,
            "tags": [], "cardData": hub.store.card(commit), **_counted(repo),
            "config": {"quantization_config": repo.quantization} if repo.quantization else {},
            "siblings": [_sibling(path, blob, sizes) for path, blob in sorted(commit.files.items())],
        }
    )  # fmt: skip


def _sibling(path: str, blob: Blob, sizes: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": path}
    if sizes:
        found |= {"size": blob.size, "blobId": blob.oid}
        if blob.large:
            found["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
    return found


def tree(hub: Hub, request: Request, name: str, revision: str, path: str = "") -> Answer:
    commit = hub.store.readable(name, request.user).resolve(revision)
    prefix = f"{path}/" if path else ""
    inside = {p: blob for p, blob in commit.files.items() if p.startswith(prefix)}
    if path and not inside:
        raise Refused(404, "EntryNotFound", f"{path} does not exist")
    entries = [_entry(hub, p, blob) for p, blob in sorted(inside.items()) if "/" not in p.removeprefix(prefix)]
    folders = {p[:i] for p in inside for i, c in enumerate(p) if c == "/" and i > len(prefix)}
    if request.query.get("recursive", "").lower() in ("true", "1"):
        entries = [_entry(hub, p, blob) for p, blob in sorted(inside.items())]
    else:
        folders = {folder for folder in folders if "/" not in folder.removeprefix(prefix)}
    entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in sorted(folders)]
    return Answer.of(entries)


def _entry(hub: Hub, path: str, blob: Blob) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.large:
        found["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": blob.pointer_size}
        if xet := hub.xet.hash_of(blob.sha256):
            found["xetHash"] = xet
    return found


def paths_info(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    commit = hub.store.readable(name, request.user).resolve(revision)
    if request.headers.get("content-type", "").startswith("application/json"):
        paths = request.json()["paths"]
    else:
        from urllib.parse import parse_qs

        paths = parse_qs(request.body.decode())["paths"]
    return Answer.of([_entry(hub, path, commit.files[path]) for path in paths if path in commit.files])


def refs(hub: Hub, request: Request, name: str) -> Answer:
    repo = hub.store.readable(name, request.user)

    def named(prefix: str) -> list[Mapping[str, str]]:
        found = {ref: sha for ref, sha in repo.refs.items() if ref.startswith(prefix)}
        return [{"name": r.removeprefix(prefix), "ref": r, "targetCommit": sha} for r, sha in found.items()]

    return Answer.of(
        {
            "branches": named("refs/heads/"),
            "tags": named("refs/tags/"),
            "converts": [],
            "pullRequests": named("refs/pr/") if "include_prs" in request.query else None,
        }
    )


def commits(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    repo = hub.store.readable(name, request.user)
    return Answer.of(
        [
            {"id": c.sha, "title": c.title, "message": "", "authors": [{"user": c.author}], "date": DATE}
            for c in repo.history(revision)
        ]
    )


def auth_check(hub: Hub, request: Request, name: str, mode: str = "read") -> Answer:
    if mode == "write":
        hub.store.writable(name, request.user)
        hub.store.check_token(request.token, name)
    else:
        hub.store.check_gate(hub.store.readable(name, request.user), request.user)
    return Answer.of({})


def xet_token(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    hub.store.check_gate(hub.store.readable(name, request.user), request.user)
    return hub.xet_token()


def resolve(hub: Hub, request: Request, name: str, revision: str, path: str) -> Answer:
    """A file's head or bytes; of a large one, where its bytes are."""
    repo = hub.store.readable(name, request.user)
    commit = repo.resolve(revision)
    hub.store.check_gate(repo, request.user)
    blob = commit.files.get(path)
    if blob is None:
        raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if not blob.large:
        return _ranged(hub, request, blob, {**headers, "ETag": f'"{blob.oid}"'})
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "ETag": f'"{blob.oid}"'}
    headers["Location"] = f"{hub.files_url}/stored/{blob.sha256}"
    if xet := hub.xet.hash_of(blob.sha256):
        token = f"{hub.url}/api/models/{name}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": xet, "Link": f'<{token}>; rel="xet-auth"'}
    return Answer(302, b"", headers)


def stored(hub: Hub, request: Request, sha256: str) -> Answer:
    path = hub.store.stored(sha256)
    if path is None:
        raise Refused(404, message="no such object")
    return _ranged(hub, request, Blob(sha256, "", path.stat().st_size, True), {"ETag": f'"{sha256}"'})


def _ranged(hub: Hub, request: Request, blob: Blob, headers: Mapping[str, str]) -> Answer:
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    with (hub.store.folder / blob.sha256).open("rb") as file:
        if request.method == "HEAD":
            return Answer(200, b"", {**headers, "Content-Length": str(blob.size)})
        if not wanted:
            return Answer(200, file.read(), headers)
        first, last = int(wanted[1]), min(int(wanted[2] or blob.size - 1), blob.size - 1)
        if first >= blob.size:
            return Answer(416, b"", {**headers, "Content-Range": f"bytes */{blob.size}"})
        file.seek(first)
        said = {**headers, "Content-Range": f"bytes {first}-{last}/{blob.size}"}
        return Answer(206, file.read(last - first + 1), said)
