"""Headers that lie about their tensors, and servers that answer with more than was asked for: neither costs a fetch."""

import json
import struct
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hfquant.errors import LimitError, SourceError
from hfquant.model.remote import FIRST, Look, look, read_headers, read_tensors
from tests.hub import read
from tests.hub.read import _ranged
from tests.hub.server import Answer, Hub, Request

SIZE = 4 * FIRST  # bytes of data: more than is fetched for a header
HONEST = {"dtype": "F32", "shape": [2, SIZE // 8], "data_offsets": [0, SIZE]}


def put(hub: Hub, folder: Path, *headers: Mapping[str, Any]) -> Look:
    """A repository with a file for each of these headers, every one of them with SIZE bytes of data."""
    (folder / "config.json").write_text("{}")
    for number, header in enumerate(headers):
        head = json.dumps(header).encode()
        content = struct.pack("<Q", len(head)) + head + bytes(SIZE)
        (folder / f"model-{number}.safetensors").write_bytes(content)
    hub.store.upload("alice/model", folder)
    return look("alice/model", None)


def fetched(hub: Hub) -> int:
    return len(hub.faults.asked("GET", "/stored/"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "repository"
    made.mkdir()
    return made


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [2, 2]},
        {"shape": []},
        {"shape": [0]},
        {"shape": [2, str(SIZE // 8)]},
        {"shape": [2, SIZE / 8]},
        {"shape": [-2, -SIZE // 8]},
        {"shape": [True, SIZE // 4]},
        {"data_offsets": [0.0, SIZE]},
        {"data_offsets": [0, float(SIZE)]},
        {"data_offsets": [False, SIZE]},
        {"data_offsets": [-4, SIZE - 4]},
        {"data_offsets": [SIZE, 0]},
        {"dtype": "F4", "data_offsets": [0, float(SIZE)]},
    ],
    ids=str,
)
def test_a_header_that_lies(hub: Hub, folder: Path, lie: Mapping[str, Any]) -> None:
    seen = put(hub, folder, {"w": {**HONEST, **lie}})
    for reading in (lambda: read_headers(seen), lambda: read_tensors(seen, {"w"}, most=10 * SIZE)):
        with pytest.raises(SourceError, match="is damaged: its header cannot be read") as found:
            reading()
        assert found.value.exit_code == 2
    assert fetched(hub) == 2, "the headers, no weight"


def test_types_of_less_than_a_byte_are_left_alone(hub: Hub, folder: Path) -> None:
    seen = put(hub, folder, {"w": {"dtype": "F4", "shape": [2, SIZE], "data_offsets": [0, SIZE]}})
    assert read_headers(seen) == {"w": ("F4", (2, SIZE))}


def test_no_more_than_was_counted(hub: Hub, folder: Path) -> None:
    seen = put(hub, folder, {"w": HONEST}, {"v": HONEST})
    assert set(read_tensors(seen, {"w", "v"}, most=2 * SIZE)) == {"w", "v"}
    hub.faults.clear()
    with pytest.raises(LimitError, match="at most"):
        read_tensors(seen, {"w", "v"}, most=2 * SIZE - 1)
    assert fetched(hub) == 3, "two headers and one weight"
    hub.faults.clear()
    with pytest.raises(LimitError):
        read_tensors(seen, {"w"}, most=SIZE - 1)
    assert fetched(hub) == 1


def test_a_name_in_several_files_is_fetched_once(hub: Hub, folder: Path) -> None:
    halves = {"dtype": "F32", "shape": [SIZE // 8], "data_offsets": [0, SIZE // 2]}
    both = {"w": halves, "v": {**halves, "data_offsets": [SIZE // 2, SIZE]}}
    seen = put(hub, folder, both, both)
    assert set(read_tensors(seen, {"w", "none"}, most=SIZE // 2)) == {"w"}
    assert fetched(hub) == 3, "two headers and one weight"


def test_nothing_is_fetched_of_what_is_empty(hub: Hub, folder: Path) -> None:
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]}
    seen = put(hub, folder, {"empty": empty, "w": HONEST})
    assert read_tensors(seen, {"empty"}, most=0) == {}
    assert fetched(hub) == 1


def test_a_server_that_ignores_ranges(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of what it sends is a header all the same; the rest is not what was asked for."""

    def whole(hub: Hub, request: Request, *more: Any) -> Answer:
        return _ranged(hub, replace(request, headers={}), *more)

    seen = put(hub, folder, {"w": HONEST})
    monkeypatch.setattr(read, "_ranged", whole)
    assert read_headers(seen) == {"w": ("F32", (2, SIZE // 8))}
    with pytest.raises(SourceError, match="did not arrive in the part"):
        read_tensors(seen, {"w"}, most=SIZE)


@pytest.mark.parametrize("change", [lambda body: body + b"more", lambda body: body[:-1]], ids=["more", "less"])
def test_a_server_that_sends_another_part(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    def other(*given: Any) -> Answer:
        answer = _ranged(*given)
        return (
            answer
            if answer.headers["Content-Range"].startswith("bytes 0-")
            else replace(answer, body=change(answer.body))
        )

    seen = put(hub, folder, {"w": HONEST})
    monkeypatch.setattr(read, "_ranged", other)
    with pytest.raises(SourceError, match="did not arrive in the part"):
        read_tensors(seen, {"w"}, most=SIZE)


def test_what_does_not_arrive_in_time(hub: Hub, folder: Path) -> None:
    save_file({"w": torch.zeros(4 << 20, dtype=torch.uint8)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    hub.store.upload("alice/model", folder)
    seen = look("alice/model", None)
    with pytest.raises(SourceError, match="did not arrive in time"):
        read_tensors(seen, {"w"}, most=4 << 20, until=time.monotonic() - 1)
    assert len(read_tensors(seen, {"w"}, most=4 << 20, until=time.monotonic() + 600)["w"][2]) == 4 << 20
