"""Several workers at one queue: each job once, on SQLite and on PostgreSQL."""

import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hfquant.conversion.service import Service
from hfquant.conversion.settings import Limits, Settings
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub

from .conftest import Desk, weights
from .databases import postgres, programs
from .forks import start

USERS = [f"user{n}" for n in range(10)]


@pytest.fixture(params=["sqlite", "postgres"])
def busy(
    request: pytest.FixtureRequest, hub: Hub, settings: Settings, model: Path, tmp_path: Path,
    made: Callable[[str], Path],
) -> Iterator[Desk]:  # fmt: skip
    """A desk for ten users, on either database."""
    hub.store.upload("alice/model", model)
    hub.store.tokens |= {f"hf_{user}{'u' * 30}": user for user in USERS}
    settings = replace(settings, limits=Limits(memory=4_000_000_000, running=4))
    if request.param == "sqlite":
        yield from _desk(hub, settings, tmp_path, made("rtn"))
    elif programs() is None:
        pytest.skip("the server programs of PostgreSQL are not installed")
    else:
        with postgres() as url:
            yield from _desk(hub, replace(settings, database=url), tmp_path, made("rtn"))


def _desk(hub: Hub, settings: Settings, folder: Path, made: Path) -> Iterator[Desk]:
    found = Desk(hub, settings, Service(settings, begin=start), folder, made)
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_two_workers_do_twenty_jobs_once_each(busy: Desk, calm: Callable[[str], dict[str, str]], killed: bool) -> None:
    """killed: a third worker is killed with two jobs in its hands; the other two do those as well."""
    jobs = {}
    for user in USERS:
        token = f"hf_{user}{'u' * 30}"
        for n in range(2):
            jobs[busy.service.submit(busy.request(target=f"{user}/r{n}"), user, token).id] = user
    if killed:
        victim = busy.work(at_once=2)
        while sum(busy.job(job, user).step == "evaluate" for job, user in jobs.items()) < 1:
            pass
        victim.kill(signal.SIGKILL)
        victim.wait()
    for _ in range(2):
        busy.work(at_once=2)
    for job, user in jobs.items():
        done = busy.ended(job, user, seconds=900)
        assert (done.state, done.failure, done.attempt) == ("done", None, 1)
        assert done.pushed is not None
        assert weights(busy.arrived(done.pushed.repo)) == calm("rtn")
        assert busy.commits(done.pushed.repo) == 1
        states = [event.data["state"] for event in busy.service.events(job, user) if event.kind == "state"]
        assert states == ["queued", "running", "done"]
    with busy.service._database.read() as connection:
        rows = connection.exec_driver_sql("SELECT worker, count(*) FROM hfquant_jobs GROUP BY worker").all()
    shares = Counter({worker: count for worker, count in rows})
    assert sum(shares.values()) == 20
    assert len(shares) >= 2
    assert min(shares.values()) >= 4, "both worked"
    commits = [entry for entry in busy.hub.faults.log if re.search(r"POST .*/commit/", entry)]
    assert len(commits) == 20 or killed
    assert busy.rooms() == []
    assert len(TOKENS) == 2
