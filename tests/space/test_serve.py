"""What is wrong with how the page is begun is said before anything of it begins."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("port", [70_000, -1])
def test_a_port_that_does_not_exist(port: int) -> None:
    refused(ResourceError, f"port {port}: there is no such port", port=port)


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Every name stands for these."""
    found = [
        (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in addresses
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)


def test_a_name_is_where_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match=r"cannot answer on nowhere\.invalid"):
        app._can_listen("nowhere.invalid", 7860)
    with pytest.raises(ResourceError, match="cannot answer on"):
        app._can_listen("a" * 70, 7860)  # no label of a name is that long
    families: list[int] = []
    create = socket.create_server

    def counted(address: Any, *, family: int) -> socket.socket:
        families.append(family)
        if family == socket.AF_INET6:  # not every machine has it
            return socket.socket()
        return create(address, family=family)

    monkeypatch.setattr(socket, "create_server", counted)
    resolving(monkeypatch, "::1")
    app._can_listen("six", 0)
    resolving(monkeypatch, "192.0.2.1", "127.0.0.1")
    app._can_listen("several", 0)
    assert families == [socket.AF_INET6, socket.AF_INET, socket.AF_INET]
    resolving(monkeypatch, "192.0.2.1")
    with pytest.raises(ResourceError, match="cannot answer on elsewhere"):
        app._can_listen("elsewhere", 0)


def test_an_address_that_is_not_this_machines() -> None:
    refused(LoginError, "this machine's login", host="192.0.2.1")


def test_a_fleet_that_cannot_be_read(tmp_path: Path) -> None:
    refused(FleetError, "none.yaml", manifest=tmp_path / "none.yaml")
    (tmp_path / "wrong.yaml").write_text("version: 1\nmodles: []\n")
    refused(FleetError, "modles", manifest=tmp_path / "wrong.yaml")
