"""A push whose process is killed, as a machine that loses its power would end it: given again, it ends as if not."""

import os
import signal
import threading
from pathlib import Path

import huggingface_hub
import pytest

from hfquant.conversion import hub as pushing
from tests.conversion.test_push import arrived, commits, requests_of_a_push
from tests.hub.faults import Kind
from tests.hub.server import Hub

POINTS = 10


def killed(hub: Hub, folder: Path, name: str, pr: bool, kind: Kind, at: int) -> int:
    """Push from a copy of this process, which is killed at a request of its -> how it ended.

    kind: `cut` before the Hub has handled that request, `lost` when it has, and before it answers.
    """
    known, asked, victim = threading.Event(), 0, 0

    def kill(method: str, path: str) -> bool:
        nonlocal asked
        asked += 1
        if asked <= at:
            return False
        if asked == at + 1 and known.wait(20):
            os.kill(victim, signal.SIGKILL)
        return True

    hub.faults.add(kind, times=10**6, matches=kill)
    victim = os.fork()
    if victim == 0:
        try:
            signal.alarm(60)  # rather than wait for ever, should it hang
            huggingface_hub.close_session()
            pushing.push(folder, name, pr=pr)
        finally:
            os._exit(0)  # it must not return into pytest
    known.set()
    _, status = os.waitpid(victim, 0)
    hub.faults.clear()
    return os.waitstatus_to_exitcode(status)


@pytest.mark.parametrize(
    ("kind", "pr"), [("cut", False), ("lost", False), ("lost", True)], ids=["unheard", "unanswered", "pull request"]
)
def test_killed_anywhere_and_given_again(hub: Hub, folder: Path, kind: Kind, pr: bool) -> None:
    if pr:
        hub.store.create("alice/measured")
    count = requests_of_a_push(hub, folder, pr=pr)
    revision = "refs/pr/1" if pr else "main"
    points = sorted({count * i // POINTS for i in range(POINTS)})
    assert len(points) == POINTS
    for point in points:
        name = f"alice/killed-{point}"
        if pr:
            hub.store.create(name)
        assert killed(hub, folder, name, pr, kind, point) == -signal.SIGKILL, point
        done = pushing.push(folder, name, pr=pr)
        assert arrived(hub, name, revision) == arrived(hub, "alice/measured", revision), point
        assert commits(hub, name, revision) == 1, point
        assert len(hub.store.repos[name].discussions) == int(pr), point
        assert done.commit == hub.store.repos[name].resolve(revision).sha
        hub.faults.clear()
