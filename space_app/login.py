"""Who is asking.

On a Space, or wherever OAuth is set up, people log in with Hugging Face: the page by its session, programs by a token
of the Hub in a header.  Elsewhere the page is for the machine's own user, and answers on loopback only.
"""

import hashlib
import ipaddress
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from hfquant.conversion.settings import own_user
from hfquant.errors import HfquantError

OAUTH = ("SYSTEM", "SPACE_ID", "OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES", "OPENID_PROVIDER_URL")
REMEMBERED = 300  # seconds that a token's owner is not asked for again
HEADERS = ("x-hf-authorization", "authorization")
OWN = own_user()  # on their own machine


@dataclass(frozen=True)
class Caller:
    """A user, what they may write to, and their token of the Hub.  expires: seconds since 1970."""

    user: str
    token: str | None = field(default=None, repr=False)
    organizations: tuple[str, ...] = ()
    expires: float | None = None

    @property
    def namespaces(self) -> list[str]:
        """Where results may go."""
        return [] if self.token is None else [self.user, *self.organizations]


class LoginError(HfquantError):
    """Nobody is logged in, or their login is not valid."""


class Login:
    """How callers are told apart.  hub: by the Hub's login, otherwise everybody is the machine's own user."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        given = [name for name in OAUTH if environment.get(name)]
        if given == ["SYSTEM"]:
            given = []
        if given and len(given) < len(OAUTH):
            missing = ", ".join(name for name in OAUTH if name not in given)
            raise LoginError(
                f"the login with Hugging Face is half set up: {missing} missing",
                "on a Space, put `hf_oauth: true` into README.md",
            )
        self.hub = bool(given)
        if self.hub and environment["SYSTEM"] != "spaces":
            # with anything else gradio signs its cookies with a key that everybody knows
            raise LoginError(f"`SYSTEM` is `{environment['SYSTEM']}`", "set it to `spaces`: the login needs it")
        # the right to rent machines in a user's name is asked for only where the Space offers them
        self.rents = not self.hub or "jobs" in environment["OAUTH_SCOPES"].split()
        self._known: dict[str, tuple[float, Caller]] = {}

    def may_listen(self, host: str) -> None:
        """Raises LoginError for an address that others can reach, where nobody can log in."""
        if not self.hub and not _is_loopback(host):
            raise LoginError(
                f"on {host} everybody could use this machine's login of the Hub",
                f"stay on 127.0.0.1, or set up the login with Hugging Face: {', '.join(OAUTH)}",
            )

    def caller(self, request: gr.Request | None) -> Caller | None:
        """Who sent a request; None if nobody is logged in.  Raises LoginError for a token that the Hub rejects."""
        if not self.hub:
            return self._own()
        if request is None:
            return None
        if (token := _bearer(request)) is not None:
            return self._owner(token)
        return _from_session(request)

    def required(self, request: gr.Request | None) -> Caller:
        """Raises LoginError if nobody is logged in."""
        found = self.caller(request)
        if found is None:
            raise LoginError("log in first", "with Hugging Face, or with a token in the header `Authorization`")
        return found

    def _own(self) -> Caller:
        token = get_token()
        if token is None:
            return Caller(OWN)
        owner = self._owner(token)
        return Caller(OWN, token, (owner.user, *owner.organizations))

    def _owner(self, token: str) -> Caller:
        key = hashlib.sha256(token.encode()).hexdigest()
        at, known = self._known.get(key, (0.0, None))
        if known is None or time.monotonic() - at > REMEMBERED:
            known = _ask(token)
            self._known[key] = (time.monotonic(), known)
        return known


def _ask(token: str) -> Caller:
    try:
        found = HfApi(token=token).whoami()
    except HfHubHTTPError as error:
        raise LoginError("the Hub does not know this token", "make one on the page of your Hub settings") from error
    return Caller(found["name"], token, tuple(org["name"] for org in found.get("orgs") or ()))


def _bearer(request: gr.Request) -> str | None:
    for name in HEADERS:
        kind, _, token = str(request.headers.get(name) or "").partition(" ")
        if kind.lower() == "bearer" and token.strip():
            return token.strip()
    return None


def _from_session(request: gr.Request) -> Caller | None:
    # not `request.session`: gradio makes attributes of its keys; a tool's call comes with starlette's request itself
    asked = getattr(request, "request", request)
    scope: Mapping[str, Any] = getattr(asked, "scope", None) or {}
    info = scope.get("session", {}).get("oauth_info") or {}
    expires = info.get("expires_at")
    if not info.get("access_token") or (expires is not None and expires < time.time()):
        return None
    user = info["userinfo"]
    organizations = tuple(org.get("preferred_username") or org["name"] for org in user.get("orgs") or ())
    return Caller(user["preferred_username"], info["access_token"], organizations, expires)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
