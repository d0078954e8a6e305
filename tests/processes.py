"""Other processes, without the seconds that an interpreter needs to import torch."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

FORKS = """
import json, os, sys, tempfile
import torch
for code in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            status = 1
            try:
                exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        said = [(f.seek(0), f.read().decode())[1] for f in (out, err)]
    print(json.dumps([os.waitstatus_to_exitcode(status), *said]), flush=True)
"""


class Said(NamedTuple):
    """What a process left behind."""

    code: int
    out: str
    err: str


def fresh(*codes: str) -> list[Said]:
    """Run each in an interpreter of its own that has imported torch, and nothing else that is heavy."""
    command = [sys.executable, "-c", FORKS, json.dumps([textwrap.dedent(code) for code in codes])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [Said(*json.loads(line)) for line in done.stdout.splitlines()]


def interrupted(work: Callable[[], object], when: Callable[[], bool], said: Path) -> int:
    """Do some work in a copy of this process, which gets a Ctrl-C as soon as when() holds -> its exit code.

    said: the file that what it prints goes to.
    """
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 1
        try:
            with said.open("w") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
                sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
                work()
                status = 0
        except SystemExit as left:
            status = int(left.code or 0)
        except BaseException:  # it must not return into pytest
            traceback.print_exc()
        finally:
            with suppress(ValueError):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    while not when():
        if os.waitpid(child, os.WNOHANG)[0]:
            raise AssertionError(f"it ended before: {said.read_text()}")
        time.sleep(0.005)
    os.kill(child, signal.SIGINT)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work: Callable[[], object], kill_after: float | None = None) -> tuple[int, float]:
    """Do some work in a copy of this process, killed after some seconds -> (exit code, -9 if killed; seconds)."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # it must not return into pytest
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        with suppress(ProcessLookupError):  # it was quicker
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start
