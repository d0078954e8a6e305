"""Heavy work in a process of its own: no token, no network, limits, and dead within a second when it is not wanted.

This is the worker's side; `child.py` is the other.  They speak JSON, a line each: the task into the child's stdin,
which stays open as long as the worker lives, and what happens out of its stdout.  What it prints otherwise is the
job's log.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

PASSED = (
    "PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS", "TZ", "SYSTEMROOT",
)  # fmt: skip
LAST_WORDS = 5.0  # seconds that a child has to end, and to be heard, when it said that it does
LINES = 1_000  # of log that may wait; a child that shouts faster is not listened to


@dataclass(frozen=True)
class Bounds:
    """What a child may take.  memory: bytes of data; file: bytes of one file; cpu, wall: seconds.  None: any."""

    memory: int | None = None
    file: int | None = None
    cpu: int | None = None
    wall: float | None = None


class Process(Protocol):
    """As much of `subprocess.Popen` as is used here."""

    pid: int
    stdin: IO[bytes] | None
    stdout: IO[bytes] | None
    stderr: IO[bytes] | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


Start = Callable[[Path], Process]


def start(folder: Path) -> Process:
    """A new Python in its own session, with a clean environment and nothing of this process but the pipes."""
    return subprocess.Popen(
        [sys.executable, "-I", "-m", "hfquant.conversion.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=environment(folder),
        start_new_session=True,
    )


def environment(folder: Path) -> dict[str, str]:
    """Of this process' environment only what is harmless; what libraries write beside the task goes to `folder`."""
    kept = {name: os.environ[name] for name in PASSED if name in os.environ}
    return kept | {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),  # see `memory.huge_pages`
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "*",
    }


class Child:
    """A running child.  `events` are what it says; kill it when it is not wanted."""

    def __init__(self, task: Mapping[str, Any], folder: Path, bounds: Bounds, begin: Start | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.process = (begin or start)(folder)
        self.said: queue.Queue[dict[str, Any]] = queue.Queue(LINES)
        self._readers = [
            threading.Thread(target=self._listen, args=(self.process.stdout, True), daemon=True),
            threading.Thread(target=self._listen, args=(self.process.stderr, False), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self.send({"task": dict(task), "bounds": asdict(bounds)})

    def send(self, document: Mapping[str, Any]) -> None:
        """A line to the child; it may be dead already, which `poll` tells."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(json.dumps(document).encode() + b"\n")
            self.process.stdin.flush()

    def _listen(self, pipe: IO[bytes] | None, speaks: bool) -> None:
        assert pipe is not None
        with suppress(ValueError, OSError):  # closed while reading: the child was killed
            while line := pipe.readline(1 << 20):
                self._hear(line, speaks)

    def _hear(self, line: bytes, speaks: bool) -> None:
        text = line.decode("utf-8", errors="replace").rstrip()
        if speaks:
            self.said.put(json.loads(text))  # ours: it waits until it is heard
        elif text:
            with suppress(queue.Full):
                self.said.put_nowait({"event": "log", "text": text[:10_000]})

    def heard(self, timeout: float) -> Iterator[dict[str, Any]]:
        """What was said until now; waits that long for the first of it."""
        with suppress(queue.Empty):
            yield self.said.get(timeout=timeout)
            while True:
                yield self.said.get_nowait()

    def exited(self) -> int | None:
        """The exit code once the child is gone and all it said is read; negative: the signal that killed it."""
        if self.process.poll() is None:
            return None
        for reader in self._readers:
            reader.join(timeout=0.2)
        return self.process.poll()

    def rest(self) -> list[dict[str, Any]]:
        """What was still under way when the child told how it ended, or did: its log comes through another pipe."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=LAST_WORDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it began, and that holds the pipes open
        found: list[dict[str, Any]] = []
        until = time.monotonic() + LAST_WORDS
        while any(reader.is_alive() for reader in self._readers) and time.monotonic() < until:
            found += self.heard(0.05)
        return [*found, *self.heard(0.0)]

    def kill(self) -> None:
        """The child and all it started, at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
