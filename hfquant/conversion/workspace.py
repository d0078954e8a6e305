"""The folders that jobs work in: one for each, named by its id, gone when it ends."""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import ResourceError
from ..tensors.shards import write_text
from .job import Unwanted

PATIENCE = 600.0  # seconds that a job waits for another process to leave its folder


@dataclass(frozen=True)
class Room:
    """One job's folder: `source` (the original), `out` (the result, and the journal of the work), `tmp`."""

    path: Path

    @property
    def source(self) -> Path:
        return self.path / "source"

    @property
    def out(self) -> Path:
        return self.path / "out"

    @property
    def tmp(self) -> Path:
        return self.path / "tmp"

    @property
    def text(self) -> Path:
        return self.path / "calibration.txt"

    def enter(self, attempt: int, *, fresh: bool) -> None:
        """Make the folder.  fresh: what earlier attempts left is removed, once."""
        marker = self.path / "attempt"
        begun = int(marker.read_text()) if marker.is_file() else 0
        if fresh and begun < attempt:
            self.remove()
        for folder in (self.source, self.tmp):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(marker, str(attempt))

    def bytes(self) -> int:
        """What lies in it now; files that go away meanwhile do not count."""
        return sum(_size(file) for file in self.path.rglob("*"))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _lock(file: IO[str]) -> bool:
    """Whether the file could be locked; the lock goes with the process, however it ends."""
    import fcntl  # workers need a POSIX system, the service does not

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _named(file: Path) -> str:
    """What names this disk: written by whoever comes first."""
    mine = file.with_name(f"place.{uuid.uuid4().hex}")
    mine.write_text(uuid.uuid4().hex)
    with suppress(FileExistsError):
        os.link(mine, file)
    mine.unlink()
    return file.read_text()


def _size(file: Path) -> int:
    try:
        found = file.lstat()
    except FileNotFoundError:
        return 0
    return found.st_blocks * 512  # what it takes, not how long it is


class Workspace:
    """All jobs' folders on one disk.  id: the same for all workers that share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "jobs"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.locks = folder / "locks"
        self.locks.mkdir(exist_ok=True, mode=0o700)
        self.id = _named(folder / "place")

    def room(self, job: str) -> Room:
        """job: an id that this service made, 32 hex digits; no text of a user's ever becomes a path."""
        if len(job) != 32 or not set(job) <= set("0123456789abcdef"):
            raise ValueError("not a job's id")
        return Room(self.folder / job)

    @contextmanager
    def locked(self, job: str, wanted: Callable[[], bool]) -> Iterator[None]:
        """Within: no other process on this disk works on the job.

        Waits for one that is about to end.  Raises Unwanted when `wanted` says no, ResourceError if it does not end.
        """
        with (self.locks / self.room(job).path.name).open("w") as file:
            until = time.monotonic() + PATIENCE
            while not _lock(file):
                if not wanted():
                    raise Unwanted
                if time.monotonic() > until:
                    raise ResourceError("another process works on this job", "resume it later")
                time.sleep(0.1)
            yield

    def check(self, needed: int) -> None:
        """Raises ResourceError if the disk has not that many bytes left."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ResourceError(
                f"{needed / 1e9:,.2f} GB of disk are needed, {free / 1e9:,.2f} GB are free", "try again later"
            )

    def sweep(self, keep: Callable[[str, float], bool]) -> list[str]:
        """Remove the folders for which `keep(job, hours since anything changed in it)` is false; returns their jobs."""
        gone = []
        for path in self.folder.iterdir():
            idle = (time.time() - max((f.lstat().st_mtime for f in (path, *path.iterdir())), default=0)) / 3600
            if not keep(path.name, idle):
                shutil.rmtree(path, ignore_errors=True)
                gone.append(path.name)
        for lock in self.locks.iterdir():
            if not keep(lock.name, 0.0):
                lock.unlink(missing_ok=True)
        return gone
