"""Disks that are full, and jobs that take more than their share: a clean failure, and the room is given back."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hfquant.conversion.service import Service
from hfquant.conversion.settings import Limits, Settings
from hfquant.conversion.worker import Worker
from hfquant.conversion.workspace import Room, Workspace
from hfquant.errors import ResourceError

from .conftest import Desk
from .forks import start


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes, where this user may make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to be allowed to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def test_a_disk_that_runs_full(desk: Desk, small_disk: Path) -> None:
    """In the middle of a job, whatever was announced: the job fails in words, its files go, the next one works."""
    desk.settings = replace(desk.settings, folder=small_disk)

    def unaware(worker: Worker) -> None:
        Workspace.check = lambda self, needed: None  # type: ignore[method-assign]
        planning = sys.modules["hfquant.compress.plan"]
        assert planning.check_room
        planning.check_room = lambda out, needed: None  # type: ignore[attr-defined]
        enter = Room.enter

        def filled(room: Room, attempt: int, *, fresh: bool) -> None:
            enter(room, attempt, fresh=fresh)
            if not (small_disk / "done").exists():
                (room.path / "ballast").write_bytes(b"x" * (free(small_disk) - 900_000))
                (small_disk / "done").touch()

        Room.enter = filled  # type: ignore[method-assign]

    job = desk.submit()
    desk.work(unaware)
    failed = desk.ended(job)
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.message) == ("ResourceError", "the disk is full")
    assert desk.rooms() == []
    assert free(small_disk) > 1_900_000, "the space is there again"


def test_more_than_a_jobs_share(desk: Desk) -> None:
    """The model's files are counted before they are fetched, the work's while it is done."""
    settings = replace(desk.settings, limits=Limits(memory=4_000_000_000, disk=800_000))
    with Service(settings, begin=start) as service:
        found = {problem.kind for problem in service.preview(desk.request()).problems}
    assert found == {"disk"}
    desk.settings = settings
    desk.work()
    failed = desk.ended(desk.submit())
    assert failed.failure is not None
    assert (failed.failure.kind, "share of the disk" in failed.failure.message) == ("ResourceError", True)


def test_work_that_writes_too_much_is_stopped(desk: Desk) -> None:
    def prepare(worker: Worker) -> None:
        from hfquant.conversion import tasks
        from hfquant.conversion.executors import local

        local.LOOK = 0.1

        def write(task: dict[str, str], *_: object) -> dict[str, object]:
            for n in range(1_000_000):
                (Path(task["out"]).parent / f"more{n}").write_bytes(b"x" * 100_000)
            return {}

        tasks.TASKS["compress"] = write  # type: ignore[assignment]

    desk.settings = replace(desk.settings, limits=Limits(memory=4_000_000_000, disk=10_000_000))
    desk.work(prepare)
    failed = desk.ended(desk.submit())
    assert failed.failure is not None
    assert (failed.failure.kind, "GB of disk, which is all it may" in failed.failure.message) == ("ResourceError", True)
    assert desk.rooms() == []


def test_the_folders(tmp_path: Path, settings: Settings) -> None:
    space = Workspace(tmp_path)
    assert Workspace(tmp_path).id == space.id, "all who share a disk know it"
    assert Workspace(tmp_path / "other").id != space.id
    for name in ("../" + "0" * 29, "0" * 31, "A" * 32, "", "0" * 33):
        with pytest.raises(ValueError, match="not a job's id"):
            space.room(name)
    room = space.room("0" * 32)
    room.enter(1, fresh=False)
    (room.out / "x").mkdir(parents=True)
    (room.out / "x" / "file").write_bytes(b"x" * 100_000)
    assert room.bytes() >= 100_000
    room.enter(2, fresh=True)
    assert not room.out.exists(), "a new beginning"
    (room.source / "file").touch()
    room.enter(2, fresh=True)
    assert (room.source / "file").exists(), "only one"
    with pytest.raises(ResourceError, match="GB of disk are needed"):
        space.check(10**18)
    assert space.sweep(lambda job, hours: True) == []
    assert space.sweep(lambda job, hours: hours < 0) == ["0" * 32]
    assert settings.secret
    assert settings.secret not in repr(settings)
