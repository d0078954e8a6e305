"""On ZeroGPU: what is lent the GPU, what the Hub is told, and that elsewhere nothing of it is there."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from hfquant.conversion import slices
from hfquant.errors import ShapeError
from space_app import app, first_look, zero
from space_app.app import create
from space_app.login import Login
from tests.conversion.jobs.conftest import Desk
from tests.serving import serving
from tests.space.conftest import SCOPES, Site, bearer, opened
from tests.space.test_doors import events

PLACE = Path(__file__).parents[2]


class Spaces(types.ModuleType):
    """As much of the package `spaces` as the page uses."""

    def __init__(self) -> None:
        super().__init__("spaces")
        self.calls: list[str] = []
        self.zero = types.ModuleType("spaces.zero")
        self.zero.startup = lambda: self.calls.append("reported")  # type: ignore[attr-defined]

    def GPU(self, duration: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def lend(work: Callable[..., Any]) -> Callable[..., Any]:
            def lent(*given: Any) -> Any:
                self.calls.append(f"{work.__name__} for {duration} s")
                return work(*given)

            return lent

        return lend


@pytest.fixture
def spaces(monkeypatch: pytest.MonkeyPatch) -> Spaces:
    found = Spaces()
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setitem(sys.modules, "spaces", found)
    monkeypatch.setitem(sys.modules, "spaces.zero", found.zero)
    return found


def look(site: Site, user: str | None, model: str = "alice/model", recipe: str = "rtn-w4g32") -> str:
    """What the button finds."""
    (event,) = events(site)("round")
    body = {"data": [model, recipe, {}], "fn_index": event["id"], "session_hash": "x" * 11}
    headers = bearer(user) if user else {}
    httpx.post(f"{site.url}/gradio_api/queue/join", json=body, headers=headers).raise_for_status()
    told = httpx.get(f"{site.url}/gradio_api/queue/data", params={"session_hash": "x" * 11}, timeout=60).text
    messages = [json.loads(line.removeprefix("data: ")) for line in told.splitlines() if line.startswith("data: ")]
    (ended,) = (message for message in messages if message["msg"] == "process_completed")
    assert ended["success"], ended
    return str(ended["output"]["data"][0])


def test_a_block_is_rounded_on_the_gpu_for_whoever_may_read_it(
    desk: Desk, spaces: Spaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(desk, monkeypatch, SCOPES) as site:
        shown = look(site, "alice")
        assert shown.count("model.layers.1.") == 7
        assert "`w4g32sym`" in shown
        assert spaces.calls == [f"rounded for {zero.SECONDS} s"]
        assert "log in first" in look(site, None)
        assert "is not on the Hub" in look(site, "alice", "alice/none")
        assert "unknown method" in look(site, "alice", recipe="rtm-w4")
        assert "Choose a model" in look(site, "alice", " ")
        desk.hub.store.repos["alice/model"].private = True
        assert "not on the Hub, or private" in look(site, "bob")
        assert len(spaces.calls) == 1, "nobody's share was spent on those"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ShapeError("W does not fit")], ids=str)
def test_what_goes_wrong_on_the_gpu_is_said(
    desk: Desk, spaces: Spaces, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(pieces: Any) -> Any:
        raise error

    monkeypatch.setattr(first_look, "rounded", fails)
    with opened(desk, monkeypatch, SCOPES) as site:
        assert str(error) in look(site, "alice")


def test_what_is_lent_is_given_numbers_only(desk: Desk) -> None:
    """It runs in a copy of the page's process: its arguments are plain, and it takes nothing else."""
    for piece in desk.service.block({"model": "alice/model", "recipe": "rtn-w4g32"}):
        kinds = {type(value) for value in vars(piece).values()}
        assert kinds <= {str, tuple, bytes, dict, bool}
    assert slices.rounded.__closure__ is None


def test_the_hub_is_told_before_the_page_answers(desk: Desk, spaces: Spaces, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody tells it, it ends the Space."""
    monkeypatch.setenv("HFQUANT_FOLDER", str(desk.folder / "own"))
    monkeypatch.delenv("HFQUANT_DATABASE", raising=False)
    monkeypatch.setattr(app, "Worker", lambda settings: nullcontext())
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: spaces.calls.append("serving"))
    monkeypatch.setattr(app.signal, "signal", lambda *_: None)
    app.serve("127.0.0.1", 7860)
    assert spaces.calls == ["reported", "serving"]


def test_elsewhere_there_is_none_of_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spaces", None)  # to import it would be an error
    assert zero.lent(slices.rounded) is slices.rounded
    zero.report()
    assert events(site)("round") == []
    with serving(create(site.desk.service, Login())) as url:
        assert events(Site(url, site.desk))("round") == []


@pytest.mark.slow  # not among what hfquant installs, so never there by itself: `pip install spaces`, then `-m slow`
def test_with_the_hubs_own_package(tmp_path: Path) -> None:
    """Its start is reported, a GPU is asked for, the work is done in a fork of its own, and given back.

    The Hub's side is made up; without a GPU its CUDA is left out, and the fork works on the processor.
    """
    if importlib.util.find_spec("spaces") is None:  # looked for, not imported: importing it changes torch
        pytest.skip("needs the Hub's package: pip install spaces")
    script = tmp_path / "script.py"
    script.write_text(REAL)
    own = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(PLACE), *sys.path])}
    words = [sys.executable, str(script)]
    ran = subprocess.run(words, env=own, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["asked"] == ["/startup-report", "/schedule", "/allow", "/release"]
    assert said["seconds"] == str(zero.SECONDS)
    assert said["here"] == said["lent"]
    assert said["forked"]


REAL = """
import json, multiprocessing, os, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit
asked, seconds = [], []

class Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        asked.append(urlsplit(self.path).path)
        seconds.extend(parse_qs(urlsplit(self.path).query).get("durationSeconds", []))
        grant = {"idle": False, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "x"}
        body = json.dumps(grant).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass

hub = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=hub.serve_forever, daemon=True).start()
os.environ |= {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{hub.server_port}"}
import torch
if torch.version.cuda is None:  # a build without CUDA, which is never there
    torch.version.cuda, torch._C._cuda_init, torch.cuda._is_in_bad_fork = "12.8", lambda: None, bool
import spaces
import spaces.zero.torch as cuda
from hfquant.conversion.slices import Piece, rounded
from hfquant.tensors.grid import Grid
from space_app import zero
W = bytes(n for n in range(256) if n not in (127, 255)) * 8  # those two are no numbers in 8 bit
pieces = [Piece("w", "F8_E4M3", (16, 127), W, vars(Grid(4, 16, True)), False)]
own = torch.cuda.is_available
torch.cuda.is_available = lambda: False
here = rounded(pieces)
torch.cuda.is_available = own
cuda.init, cuda.move = lambda uuid: None, lambda callback=None: None
def work(given):
    return [os.getpid(), rounded(given)]
on_gpu = zero.lent(work)
zero.report()
pid, lent = on_gpu(pieces)
print(json.dumps({"asked": asked, "seconds": seconds[0], "here": here[0].error, "lent": lent[0].error,
                  "forked": pid != os.getpid()}))
for process in multiprocessing.active_children():
    process.kill()
sys.stdout.flush()
os._exit(0)
"""
