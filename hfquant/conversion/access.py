"""Who may push where: found out before any work, and nothing is changed on the Hub."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from ..errors import HubError
from ..model.remote import Token
from ..report import FILE as REPORT
from .provenance import FILE as PROVENANCE
from .retry import patiently
from .verify import Remote

EMPTY = {".gitattributes"}
MAIN = "main"


@dataclass(frozen=True)
class Target:
    """A repository that may be pushed to.  `user` pushes, None: its trusted publisher.  exists: it is there already."""

    repo: str
    user: str | None
    exists: bool
    private: bool | None = None


def check_access(
    repo: str,
    *,
    private: bool | None = None,
    pr: bool = False,
    revision: str | None = None,
    force: bool = False,
    token: Token = None,
) -> Target:
    """Find out whether `push` could succeed, before any work; nothing is changed on the Hub.

    token: whom the Hub is to take this for; None is the login of this machine, False nobody.

    Raises HubError if nobody is logged in, the token or the user may not write there, or the repository holds what
    hfquant did not make (and `force` is not set).
    """
    if pr and revision not in (None, MAIN):
        raise HubError("a pull request is made against the main branch", "leave out `--revision` or `--pr`")
    return patiently(lambda: _access(HfApi(token=token), repo, private, pr, revision or MAIN, force))


def _access(api: HfApi, repo: str, private: bool | None, pr: bool, revision: str, force: bool) -> Target:
    validate_repo_id(repo)
    user, writable = namespaces(api)
    pusher = user if writable else None
    repo = repo if "/" in repo else f"{user}/{repo}"
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        if repo.partition("/")[0] not in writable:
            raise HubError(
                f"{repo} does not exist, and {pusher or 'a trusted publisher'} may not create it",
                f"push to `{user}/{repo.partition('/')[2]}`, or use a token of {repo.partition('/')[0]}"
                if pusher
                else "create it on the Hub, and name this workflow on its page as trusted publisher",
            ) from None
        if pr:
            raise HubError(f"{repo} does not exist yet", "leave out `--pr`: the first push creates it") from None
        return Target(repo, pusher, False)
    if not pr:
        api.auth_check(repo, write=True)
    if private is not None and info.private is not None and private != info.private:
        kind, option = ("private", "--public") if info.private else ("public", "--private")
        raise HubError(f"{repo} exists and is {kind}", f"change that in its settings, or leave out `{option}`")
    head = Remote.read(api, repo, revision)
    if head is not None and not force and not _is_ours(api, repo, head):
        raise HubError(
            f"{repo} holds files that hfquant did not make", "push to another name, or replace them with `--force`"
        )
    return Target(repo, pusher, True, info.private)


def namespaces(api: HfApi) -> tuple[str, set[str]]:
    """The user, and the namespaces that this token may write to as far as the Hub says.

    A trusted publisher's token is for one repository and nobody's own: its namespace, and none to create others in.
    """
    if api.token is None and "/" in (publishes := os.environ.get("HF_OIDC_RESOURCE", "")):
        return publishes.partition("/")[0], set()
    if api.token is False or (api.token is None and get_token() is None):
        raise HubError("you are not logged in to the Hub", "`hf auth login`, or set HF_TOKEN")
    me = api.whoami()
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise HubError("this token may only read", "make one that may write, on the Hub's page of access tokens")
    orgs = {org["name"] for org in me.get("orgs") or () if org.get("roleInOrg") != "read"}
    return str(me["name"]), {str(me["name"]), *orgs}


def _is_ours(api: HfApi, repo: str, head: Remote) -> bool:
    """Whether what is there came from hfquant, or nothing is there."""
    if head.files.keys() <= EMPTY:
        return True
    for name in (PROVENANCE, REPORT, "config.json"):
        found = read_json(api, repo, head, name)
        if name != "config.json" and "schema" in found and ("key" in found or "hfquant" in found):
            return True
        stored = found.get("quantization_config") or {}
        if stored.get("quant_method") == "hfquant" or "hfquant" in str((stored.get("meta") or {}).get("quantizer")):
            return True
    return False


def read_json(api: HfApi, repo: str, head: Remote, name: str) -> Mapping[str, Any]:
    """A small JSON file of a repository; empty if there is none, or none that is a JSON object."""
    if name not in head.files or head.files[name].size > 50_000_000:
        return {}
    with tempfile.TemporaryDirectory(prefix="hfquant-") as folder:
        try:
            path = api.hf_hub_download(repo, name, revision=head.commit, local_dir=folder)
            found = json.loads(Path(path).read_text("utf-8"))
        except (RemoteEntryNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
            return {}
    return found if isinstance(found, dict) else {}
