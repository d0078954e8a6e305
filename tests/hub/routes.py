"""Which function answers which request."""

from collections.abc import Callable
from typing import Any

from . import jobs, oauth, read, talk, write
from .server import Answer, Hub, Request
from .store import Refused

REPO: dict[tuple[str, str], Callable[..., Answer]] = {
    ("GET", ""): read.info,
    ("GET", "revision"): read.info,
    ("GET", "tree"): read.tree,
    ("POST", "paths-info"): read.paths_info,
    ("GET", "refs"): read.refs,
    ("GET", "commits"): read.commits,
    ("GET", "auth-check"): read.auth_check,
    ("GET", "xet-read-token"): read.xet_token,
    ("GET", "xet-write-token"): write.xet_token,
    ("POST", "preupload"): write.preupload,
    ("POST", "commit"): write.commit,
    ("POST", "branch"): write.branch,
    ("POST", "tag"): write.tag,
    ("PUT", "settings"): write.settings,
    ("GET", "discussions"): talk.discussions,
    ("POST", "discussions"): talk.discuss,
}
PLAIN: dict[tuple[str, str], Callable[[Hub, Request], Answer]] = {
    ("GET", "whoami-v2"): read.whoami,
    ("GET", "models"): read.models,
    ("POST", "repos/create"): write.create,
    ("DELETE", "repos/delete"): write.delete,
    ("POST", "validate-yaml"): write.validate_yaml,
}
LOGIN: dict[str, Callable[[Hub, Request], Answer]] = {
    ".well-known/openid-configuration": oauth.configuration,
    "oauth/authorize": oauth.authorize,
    "oauth/token": oauth.token,
    "oauth/userinfo": oauth.userinfo,
    "oauth/jwks": oauth.jwks,
    "actions/run": oauth.run,
}


def route(hub: Hub, request: Request) -> Answer:
    """Answer a request, or refuse it."""
    method, parts = "GET" if request.method == "HEAD" else request.method, request.parts  # the same, without a body
    if parts[0] == "api":
        if found := PLAIN.get((method, "/".join(parts[1:]))):
            return found(hub, request)
        if parts[1] == "jobs" and len(parts) >= 3:
            return jobs.route(hub, request)
        if parts[1] == "models" and len(parts) >= 4:
            action = parts[4] if len(parts) > 4 else ""
            if of_repo := REPO.get((method, action)):
                return of_repo(hub, request, "/".join(parts[2:4]), *_rest(action, parts[5:]))
    elif found := LOGIN.get("/".join(parts)):
        return found(hub, request)
    elif parts[0] == "lfs":
        return write.lfs(hub, request)
    elif len(parts) > 4 and parts[2] == "resolve":
        return read.resolve(hub, request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
    elif parts[1:] and parts[1].endswith(".git") and parts[2:] == ("info", "lfs", "objects", "batch"):
        return write.batch(hub, request, f"{parts[0]}/{parts[1].removesuffix('.git')}")
    elif parts[0] == "stored":
        return read.stored(hub, request, parts[1])
    raise Refused(404, "", f"no route for {method} /{'/'.join(parts)}")


def _rest(action: str, rest: tuple[str, ...]) -> list[Any]:
    """revision and path of what takes them, otherwise what follows the action."""
    if action == "tree":
        return [rest[0], "/".join(rest[1:])]
    return list(rest)
