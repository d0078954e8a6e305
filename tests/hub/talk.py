"""Pull requests and discussions."""

from typing import Any

from .server import Answer, Hub, Request
from .store import DATE, PullRequest, Refused, Repo


def open_pull_request(repo: Repo, title: str, author: str, base: str = "main") -> PullRequest:
    """A pull request with a reference of its own, at the head of its base."""
    made = PullRequest(len(repo.discussions) + 1, title, author, base)
    repo.discussions.append(made)
    repo.refs[f"refs/pr/{made.num}"] = repo.resolve(base).sha
    return made


def discussions(hub: Hub, request: Request, name: str, num: str = "") -> Answer:
    repo = hub.store.readable(name, request.user)
    if num:
        return Answer.of(_details(repo, _find(repo, num)))
    found = [
        d
        for d in repo.discussions
        if request.query.get("author") in (None, d.author)
        and (request.query.get("type") != "pull_request" or d.is_pull_request)
        and (request.query.get("status") != "open" or d.status in ("open", "draft"))
    ]
    start = 2 * int(request.query.get("p", 0))  # pages of two, so that they are turned
    page = [_facts(repo, d) for d in found[start : start + 2]]
    return Answer.of({"discussions": page, "count": len(found), "start": start})


def discuss(hub: Hub, request: Request, name: str, num: str = "", action: str = "") -> Answer:
    repo = hub.store.readable(name, request.user)
    if request.user is None:
        raise Refused(401, message="Invalid username or password.")
    asked = request.json() or {}
    if not num:
        if asked.get("pullRequest"):
            return Answer.of({"num": open_pull_request(repo, asked["title"], request.user).num})
        plain = PullRequest(len(repo.discussions) + 1, asked["title"], request.user, "main", "open", False)
        repo.discussions.append(plain)
        return Answer.of({"num": plain.num})
    found = _find(repo, num)
    if action == "merge":
        hub.store.writable(name, request.user)
        base = f"refs/heads/{found.base}"
        files = dict(repo.resolve(f"refs/pr/{num}").files)
        repo.commit(base, f"{found.title} (#{num})", request.user, files)
        found.status = "merged"
    elif action == "status":
        found.status = asked["status"]
    event = {"id": "0", "type": "comment", "createdAt": DATE, "author": {"name": request.user}}
    return Answer.of({"newMessage": {**event, "data": {"edited": False, "hidden": False, "latest": {"raw": ""}}},
                      "newStatus": {**event, "type": "status-change", "data": {"status": found.status}}})  # fmt: skip


def _find(repo: Repo, num: str) -> PullRequest:
    found = next((d for d in repo.discussions if str(d.num) == num), None)
    if found is None:
        raise Refused(404, message="no such discussion")
    return found


def _facts(repo: Repo, found: PullRequest) -> dict[str, Any]:
    return {
        "num": found.num, "title": found.title, "status": found.status, "isPullRequest": found.is_pull_request,
        "author": {"name": found.author}, "createdAt": DATE, "repo": {"name": repo.id, "type": "model"},
    }  # fmt: skip


def _details(repo: Repo, found: PullRequest) -> dict[str, Any]:
    changes = {"base": f"refs/heads/{found.base}"}
    return {**_facts(repo, found), "changes": changes, "filesWithConflicts": [], "events": [], "diff": ""}
