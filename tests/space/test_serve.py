"""What is wrong with how the page is begun is said before anything of it begins."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hfquant.errors import FleetError, HfquantError, ResourceError
from space_app import app
from space_app.login import OAUTH, LoginError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One's own machine, where nothing was begun before the test, nor after it."""
    for name in OAUTH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HFQUANT_FOLDER", str(tmp_path / "data"))
    monkeypatch.setattr(app, "Worker", None)
    yield
    assert not (tmp_path / "data").exists()


def refused(kind: type[HfquantError], words: str, host: str = "127.0.0.1", port: int = 0, **more: Path) -> None:
    with pytest.raises(kind, match=words) as found:
        app.serve(host, port, **more)
    assert found.value.hint


def test_an_address_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused(ResourceError, f"cannot answer on 127.0.0.1, port {port}: Address already in use", port=port)


def test_an_address_that_is_not_this_machines() -> None:
    refused(LoginError, "this machine's login", host="192.0.2.1")


def test_a_fleet_that_cannot_be_read(tmp_path: Path) -> None:
    refused(FleetError, "none.yaml", manifest=tmp_path / "none.yaml")
    (tmp_path / "wrong.yaml").write_text("version: 1\nmodles: []\n")
    refused(FleetError, "modles", manifest=tmp_path / "wrong.yaml")
