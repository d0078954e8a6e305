"""Fixtures: a Hub, and this process made to believe that it is the one."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from .server import Hub

TOKENS = {"alice": "hf_" + "a" * 34, "bob": "hf_" + "b" * 34}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the users alice and bob, alice logged in, nothing of the real one in reach, and no waiting."""
    with Hub(tmp_path / "hub") as made:
        made.store.tokens |= {token: user for user, token in TOKENS.items()}
        log_in(monkeypatch, made, "alice")
        cache = tmp_path / "cache"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", made.url)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        huggingface_hub.close_session()
        yield made
        huggingface_hub.close_session()


def log_in(monkeypatch: pytest.MonkeyPatch, hub: Hub, user: str | None) -> None:
    """Act as that user, or as nobody."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(hub.store.folder / "no-token"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(hub.store.folder / "no-token"))
    if user:
        monkeypatch.setenv("HF_TOKEN", TOKENS[user])
