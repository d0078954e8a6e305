"""The process that does the work, beside the page: started with it, restarted if it dies, ended with it."""

import logging
import os
import subprocess
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from hfquant.conversion.settings import Settings

log = logging.getLogger(__name__)
PAUSE = 5.0  # seconds before a worker that died is started again
NICE = 10  # how far its work stands back: it takes every processor, and the page has to answer meanwhile


class Worker:
    """Within: `hfquant worker` runs on the same database, as its own process."""

    def __init__(self, settings: Settings) -> None:
        self.environment = os.environ | {
            "HFQUANT_DATABASE": settings.database,
            "HFQUANT_FOLDER": str(settings.folder),
            "HFQUANT_SECRET": settings.secret or "",
        }
        self._ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ending.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._thread.join(timeout=30)

    def _keep(self) -> None:
        while not self._ending.is_set():
            self._process = subprocess.Popen([sys.executable, "-m", "hfquant", "worker"], env=self.environment)
            if self._ending.is_set():  # the page ended while it began
                self._process.terminate()
            _stand_back(self._process.pid)
            code = self._process.wait()
            if not self._ending.is_set():
                log.error("the worker ended with %s; it is started again", code)
                self._ending.wait(PAUSE)


def _stand_back(process: int) -> None:
    """Before it has children, which take after it."""
    if hasattr(os, "setpriority"):  # nowhere on Windows
        with suppress(ProcessLookupError):  # it has ended: `wait` tells
            os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
