"""The page on a real server, before a Hub of its own, with people who log in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import gradio.oauth
import pytest

from space_app.app import create
from space_app.login import Login
from tests.conversion.jobs.conftest import Desk, calm, desk, made, model, settings
from tests.hub.fixtures import TOKENS
from tests.serving import serving

__all__ = ["calm", "desk", "made", "model", "settings"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of gradio and pandas about each other would be errors inside of the server."""
    for item in items:
        if "tests/space" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@dataclass
class Site:
    """url: of the page."""

    url: str
    desk: Desk


SCOPES = "openid profile contribute-repos"


@contextmanager
def opened(desk: Desk, monkeypatch: pytest.MonkeyPatch, scopes: str = SCOPES) -> Iterator[Site]:
    """The Space, where people log in with the Hub of the test, who are asked for these rights."""
    environment = {
        "SYSTEM": "spaces", "SPACE_ID": "acme/space", "OAUTH_CLIENT_ID": "client", "OAUTH_CLIENT_SECRET": "secret",
        "OAUTH_SCOPES": scopes, "OPENID_PROVIDER_URL": desk.hub.url,
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        if hasattr(gradio.oauth, name):
            monkeypatch.setattr(gradio.oauth, name, value)
    with serving(create(desk.service, Login())) as url:
        yield Site(url, desk)


@pytest.fixture
def site(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The Space, with the least rights."""
    with opened(desk, monkeypatch) as found:
        yield found


def bearer(user: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[user]}"}
