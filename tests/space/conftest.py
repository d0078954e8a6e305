"""The page on a real server, before a Hub of its own, with people who log in."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio.oauth
import pytest
import uvicorn

from space_app.app import create
from space_app.login import Login
from tests.conversion.jobs.conftest import Desk, calm, desk, made, model, settings
from tests.hub.fixtures import TOKENS

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


@pytest.fixture
def site(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The Space, where people log in with the Hub of the test."""
    environment = {
        "SYSTEM": "spaces", "SPACE_ID": "acme/space", "OAUTH_CLIENT_ID": "client", "OAUTH_CLIENT_SECRET": "secret",
        "OAUTH_SCOPES": "openid profile contribute-repos", "OPENID_PROVIDER_URL": desk.hub.url,
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        if hasattr(gradio.oauth, name):
            monkeypatch.setattr(gradio.oauth, name, value)
    with serving(create(desk.service, Login())) as url:
        yield Site(url, desk)


class serving:
    """Within: an application answers on loopback; gives its URL."""

    def __init__(self, app: Any) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        # idle connections stay: a worker is a fork that holds them open, so that a browser would not see them end, and
        # ask on where nobody listens
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, timeout_keep_alive=3600)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        until = time.monotonic() + 60
        while not self._server.started:
            assert time.monotonic() < until
            time.sleep(0.02)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)
        self._socket.close()


def bearer(user: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[user]}"}
