"""The worker that the page keeps beside itself."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hfquant.conversion.settings import Settings
from space_app import worker


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], psutil.Process]:
    """A program in the interpreter's place that notes its process and stays -> the process that began as number n."""
    pids, program = tmp_path / "pids", tmp_path / "program"
    program.write_text(f'#!/bin/sh\necho $$ "$@" >> {pids}\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(program))
    monkeypatch.setattr(worker, "PAUSE", 0.05)

    def number(n: int) -> psutil.Process:
        until = time.monotonic() + 20
        while not pids.exists() or len(lines := pids.read_text().splitlines()) <= n:
            assert time.monotonic() < until, "it was not begun"
            time.sleep(0.02)
        pid, *words = lines[n].split()
        assert words == ["-m", "hfquant", "worker"]
        return psutil.Process(int(pid))

    return number


@pytest.mark.skipif(not hasattr(os, "setpriority"), reason="priorities are those of POSIX")
def test_it_stands_back_begins_again_and_ends_with_the_page(
    tmp_path: Path, begun: Callable[[int], psutil.Process]
) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with worker.Worker(Settings(database="sqlite://", folder=tmp_path / "data")):
        first = begun(0)
        until = time.monotonic() + 20
        while first.nice() != min(19, usual + worker.NICE):
            assert time.monotonic() < until, f"its priority is {first.nice()}, the page's {usual}"
            time.sleep(0.02)
        first.kill()
        second = begun(1)
        assert second.is_running()
    assert not second.is_running() or second.status() == psutil.STATUS_ZOMBIE
