"""A crash at any moment costs at most the block in work, and changes no byte of the result."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hfquant.compress import compress, plan
from hfquant.errors import CheckpointError
from tests.compress.folders import digests

SETTINGS = {"samples": 8, "seq_len": 64}

# Imports once, then forks a child for every line it reads: starting Python each time would take minutes.
SERVER = """
import os, sys
import torch
import hfquant
from hfquant.compress import compress
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    model, recipe, out = line.split("\\t")
    child = os.fork()
    if child == 0:
        for layer in compress(model, recipe, out.strip(), samples=8, seq_len=64):
            pass
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


class Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, model: Path, recipe: str, out: Path, kill_after: float | None = None) -> tuple[bool, float]:
        """-> (finished, seconds)"""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{model}\t{recipe}\t{out}\n")
        self.process.stdin.flush()
        child, start = int(self._line()), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it was quicker
                os.kill(child, signal.SIGKILL)
        status = int(self._line())
        assert status in (0, signal.SIGKILL), status
        return status == 0, time.monotonic() - start

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_twenty_kills_change_no_byte(family: str, built: Callable[[str], Path], tmp_path: Path) -> None:
    server, recipe, random_ = Server(), "gptq-w4g32", random.Random(0)
    try:
        finished, seconds = server.run(built(family), recipe, tmp_path / "calm")
        assert finished
        kills, folders = 0, 0
        while kills < 10:  # two families: twenty
            folders += 1
            out = tmp_path / f"killed{folders}"
            for _ in range(3):  # up to three in a row on the same folder
                finished, _ = server.run(built(family), recipe, out, random_.uniform(0, seconds))
                # killed when all was done, before it could say so
                finished = finished or ((out / "report.json").is_file() and not (out / ".hfquant").exists())
                if finished:
                    break
                kills += 1
            if not finished:
                finished, _ = server.run(built(family), recipe, out)
            assert finished
            assert digests(out) == digests(tmp_path / "calm")
    finally:
        server.close()


def _stop_after(layers: int, model: Path, recipe: str, out: Path) -> None:
    for count, _ in enumerate(compress(model, recipe, out, **SETTINGS), 1):
        if count == layers:
            return


def test_a_stopped_run_goes_on_and_says_how_far_it_was(built: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = built("llama"), tmp_path / "out"
    _stop_after(8, model, "gptq-w4g32", out)  # seven layers a block
    todo = plan(model, "gptq-w4g32", out, **SETTINGS)
    assert todo.resumed == 1
    rows = [layer.block for layer in compress(todo)]
    assert set(rows) == {1, 2}
    list(compress(model, "gptq-w4g32", tmp_path / "calm", **SETTINGS))
    assert digests(out) == digests(tmp_path / "calm")


@pytest.mark.parametrize(
    ("recipe", "settings", "named"),
    [("gptq-w3g32", SETTINGS, "recipe"), ("gptq-w4g32", SETTINGS | {"seed": 1}, "calibration")],
)
def test_other_settings_do_not_continue(
    recipe: str, settings: dict[str, int], named: str, built: Callable[[str], Path], tmp_path: Path
) -> None:
    _stop_after(8, built("llama"), "gptq-w4g32", tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"another .*{named}.*\n\nhint: .*--fresh"):
        plan(built("llama"), recipe, tmp_path / "out", **settings)
    assert plan(built("llama"), recipe, tmp_path / "out", fresh=True, **settings).resumed == 0


def test_a_lost_stream_is_noticed(built: Callable[[str], Path], tmp_path: Path) -> None:
    _stop_after(8, built("llama"), "gptq-w4g32", tmp_path / "out")
    (stream,) = (tmp_path / "out" / ".hfquant" / "stream").glob("*.stream.00001")
    stream.write_bytes(stream.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        list(compress(built("llama"), "gptq-w4g32", tmp_path / "out", **SETTINGS))


def test_matching_the_original_resumes_too(built: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = {"steps": [{"method": "gptq", "match_original": 0.5}], "grid": "w4g32", "calibration": SETTINGS}
    for count, _ in enumerate(compress(built("llama"), recipe, tmp_path / "out"), 1):
        if count == 16:
            break
    list(compress(built("llama"), recipe, tmp_path / "out"))
    list(compress(built("llama"), recipe, tmp_path / "calm"))
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")
