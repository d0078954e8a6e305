"""Who may do what: on one's own machine, and where people log in with the Hub."""

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from space_app.login import OAUTH, OWN, Caller, Login, LoginError
from tests.space.conftest import Site

SPACE = {name: "x" for name in OAUTH} | {"SYSTEM": "spaces"}


def http(session: dict[str, Any] | None = None, **headers: str) -> Any:
    asked = SimpleNamespace(scope={"session": session or {}})
    return SimpleNamespace(request=asked, headers={k.replace("_", "-"): v for k, v in headers.items()})


def session(**changes: Any) -> dict[str, Any]:
    user = {"preferred_username": "alice", "orgs": [{"name": "Acme Corp", "preferred_username": "acme"}]}
    info = {"access_token": "hf_oauth_1", "expires_at": time.time() + 60, "userinfo": user}
    return {"oauth_info": info | changes}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.0.1"])
def test_own_machine_listens_on_loopback(host: str) -> None:
    Login({}).may_listen(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_others_cannot_use_this_machines_login(host: str) -> None:
    with pytest.raises(LoginError, match="this machine's login"):
        Login({}).may_listen(host)
    Login(SPACE).may_listen(host)


@pytest.mark.parametrize("missing", OAUTH[1:])
def test_half_a_login_is_none(missing: str) -> None:
    with pytest.raises(LoginError, match=missing):
        Login({name: value for name, value in SPACE.items() if name != missing})


def test_machines_are_offered_where_the_right_to_rent_them_is_asked_for() -> None:
    assert Login({}).rents
    assert Login(SPACE | {"OAUTH_SCOPES": "openid contribute-repos jobs"}).rents
    assert not Login(SPACE | {"OAUTH_SCOPES": "openid contribute-repos"}).rents


def test_where_gradio_would_sign_with_a_known_key_nobody_logs_in() -> None:
    with pytest.raises(LoginError, match="SYSTEM"):
        Login(SPACE | {"SYSTEM": "docker"})


def test_a_session_is_its_user_with_their_organizations() -> None:
    caller = Login(SPACE).caller(http(session()))
    assert caller is not None
    assert caller.user == "alice"
    assert caller.namespaces == ["alice", "acme"]
    assert "hf_oauth_1" not in repr(caller)


@pytest.mark.parametrize("bad", [{}, {"access_token": None}, {"expires_at": 1.0}])
def test_no_session_is_nobody(bad: dict[str, Any]) -> None:
    found = http(session(**bad) if bad else {})
    assert Login(SPACE).caller(found) is None
    with pytest.raises(LoginError, match="log in"):
        Login(SPACE).required(found)


def test_a_call_of_a_tool_without_a_login_is_nobody() -> None:
    """It comes as starlette's request, without gradio's around it."""
    asked = SimpleNamespace(scope={"session": {}}, headers={})
    assert Login(SPACE).caller(asked) is None  # type: ignore[arg-type]


def test_a_token_is_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("space_app.login._ask", lambda token: asked.append(token) or Caller("bob", token))
    login = Login(SPACE)
    for header in ({"authorization": "Bearer hf_a"}, {"x_hf_authorization": "Bearer hf_a"}):
        caller = login.caller(http(**header))
        assert caller is not None
        assert caller.user == "bob"
    assert asked == ["hf_a"]
    other = login.caller(http(authorization="Bearer hf_b"))
    assert other is not None
    assert other.token == "hf_b"


def test_what_is_no_bearer_is_ignored() -> None:
    assert Login(SPACE).caller(http(authorization="Basic YTpi")) is None
    assert Login(SPACE).caller(http(authorization="Bearer ")) is None


def test_on_ones_own_machine_headers_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("space_app.login.get_token", lambda: None)
    caller = Login({}).caller(http(session(), authorization="Bearer hf_a"))
    assert caller == Caller(OWN)
    assert caller.namespaces == []


def test_a_cookie_signed_with_the_key_that_gradio_has_elsewhere_is_nobody(site: Site) -> None:
    """Outside of a Space gradio signs with a constant, which everybody can read in its source."""
    import base64
    import hashlib
    import json

    import httpx
    from itsdangerous import TimestampSigner

    value = base64.b64encode(json.dumps(session()).encode())
    answers = []
    for key in ("-v4", os.environ["OAUTH_CLIENT_SECRET"] + "-v4"):
        cookie = TimestampSigner(hashlib.sha256(key.encode()).hexdigest()).sign(value).decode()
        call = httpx.post(f"{site.url}/gradio_api/call/jobs", json={"data": []}, cookies={"session": cookie}).json()
        answers.append(
            httpx.get(f"{site.url}/gradio_api/call/jobs/{call['event_id']}", cookies={"session": cookie}).text
        )
    assert "error" in answers[0], "forged"
    assert "complete" in answers[1], "signed with the Space's own secret, the same cookie is a login"
