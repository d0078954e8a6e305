"""Processes made by forking this one, which has everything imported: starting Python anew takes seconds each time."""

import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from hfquant.conversion import child
from hfquant.conversion.sandbox import environment
from space_app import forks

forks.spare()  # workers fork while their other threads talk to the Hub


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which only wait for requests here
        return os.fork()


class Forked:
    """As `subprocess.Popen`, of a child that does `work`."""

    def __init__(self, work: Callable[[], Any], log: Path | None = None) -> None:
        self.code: int | None = None
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        self.pid = _fork()
        if self.pid == 0:
            self._be(work, log)

    def _be(self, work: Callable[[], Any], log: Path | None) -> NoReturn:
        code = 70
        try:
            if log is not None:
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(file, 1)
                os.dup2(file, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            for name in (None, "dbos"):  # what other tests left writes to what is closed by now
                logging.getLogger(name).handlers.clear()
            torch.set_num_threads(1)
            work()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:  # it must not return into pytest
            traceback.print_exc()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            with suppress(ChildProcessError):
                found, status = os.waitpid(self.pid, os.WNOHANG)
                if found:
                    self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (timeout or 60)
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 60)
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def kill(self, how: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, how)


def start(folder: Path) -> Forked:
    """A sandboxed child, as `sandbox.start` begins one, but quickly."""
    ends = [os.pipe() for _ in range(3)]
    (in_read, in_write), (out_read, out_write), (err_read, err_write) = ends

    def be() -> None:
        os.setsid()
        for source, target in ((in_read, 0), (out_write, 1), (err_write, 2)):
            os.dup2(source, target)
        # As `subprocess` does.  Children begun at once by several threads have ends of each other's pipes too, and
        # would keep open what the reader at the other end waits to see closed.
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.environ.clear()
        os.environ.update(environment(folder))
        os.chdir(folder)
        child.main()

    made = Forked(be)
    for end in (in_read, out_write, err_write):
        os.close(end)
    made.stdin, made.stdout, made.stderr = (
        os.fdopen(in_write, "wb"),
        os.fdopen(out_read, "rb"),
        os.fdopen(err_read, "rb"),
    )
    return made
