"""Who may begin what, in which order it is done, and who sees it.  No worker works here; the queue's own claims do."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from hfquant.conversion import service as serving
from hfquant.conversion.claims import Claim, Claims
from hfquant.conversion.job import Failure
from hfquant.conversion.queue import workflow_id
from hfquant.conversion.service import Service
from hfquant.conversion.settings import Limits, Settings
from hfquant.errors import JobError, LimitError, RecipeError, RequestError, TokenError
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub

from .databases import postgres, programs

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def service(
    request: pytest.FixtureRequest, settings: Settings, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> Iterator[Service]:
    """A service whose requests are not compared with the Hub."""
    monkeypatch.setattr(serving.checks, "target", lambda *_: None)
    if request.param == "postgres":
        if programs() is None:
            pytest.skip("the server programs of PostgreSQL are not installed")
        settings = replace(settings, database=request.getfixturevalue("server"))
    with Service(replace(settings, limits=Limits())) as made:
        yield made
        if request.param == "postgres":
            _empty(made)


def working(service: Service) -> Claims:
    """What a worker of this service would ask."""
    return Claims(service._database, service._queue, service.vault, service.settings.limits)


def _empty(service: Service) -> None:
    import sqlalchemy as sa

    with service._database.write() as connection:
        for table in ("hfquant_jobs", "hfquant_workers", "dbos.workflow_status"):
            connection.execute(sa.text(f"DELETE FROM {table}"))


@pytest.fixture
def submit(service: Service) -> Callable[..., str]:
    def make(number: int, user: str = "alice", **more: Any) -> str:
        wish = {"model": "alice/model", "revision": COMMIT, "recipe": "rtn-w4g32", "target": f"{user}/r{number}"}
        return service.submit(wish | more, user, TOKENS.get(user, "hf_" + "x" * 34)).id

    return make


def queued(service: Service) -> list[str]:
    """The jobs that DBOS has, in the order in which it will hand them out."""
    found = service._queue._client.list_queued_workflows(load_input=False)
    found = [w for w in found if w.status == "ENQUEUED"]
    return [w.workflow_id.partition(".")[0] for w in sorted(found, key=lambda w: (w.priority, w.created_at))]


def end(service: Service, job: str, state: Any = "done") -> None:
    """What a worker would do with a job."""
    attempt = service._board.find(job)["attempt"]  # type: ignore[index]
    working(service).take(Claim(job, attempt, "w"), "here")
    working(service).finish(Claim(job, attempt, "w"), state, Failure("Bug", "x") if state == "failed" else None)
    service._queue.cancel(job, attempt)


def test_equal_requests_are_one_job(service: Service, submit: Callable[..., str]) -> None:
    job = submit(1)
    assert len(job) == 32
    wish = service.status(job, "alice").request | {"priority": 3}
    again = service.submit(wish, "alice", TOKENS["alice"])
    assert (again.id, again.created) == (job, False), "how it is written does not matter, nor how urgent it is"
    others = [submit(1, recipe="rtn-w3g32"), submit(2), submit(1, "bob")]
    assert len({job, *others}) == 4
    end(service, job)
    assert submit(1) == job, "also when it is done"
    assert service.status(job, "alice").attempt == 1
    end(service, others[1], "failed")
    assert submit(2) == others[1]
    revived = service.status(others[1], "alice")
    assert (revived.attempt, revived.state, revived.failure) == (2, "queued", None)


def test_two_at_the_same_time_are_one(service: Service, submit: Callable[..., str]) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(submit(1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(queued(service)) == 1


def test_one_runs_three_wait_and_no_more(service: Service, submit: Callable[..., str]) -> None:
    mine = [submit(n) for n in range(4)]
    for n in range(4, 50):
        with pytest.raises(LimitError, match="4 of your jobs are running or waiting"):
            submit(n)
    assert [p.kind for p in service._board.hindrances("alice")] == ["limit"]
    assert service._board.hindrances("bob") == []
    theirs = submit(0, "bob")
    assert queued(service) == [mine[0], theirs], "one of each user"
    assert [service.status(job, "alice").place for job in mine] == [1, 2, 3, 4]
    end(service, mine[0])
    assert queued(service) == [theirs, mine[1]], "the next one follows"
    service.cancel(mine[1], "alice")
    assert queued(service) == [theirs, mine[2]]
    submit(60)


def test_the_urgent_go_first_whoever_they_are_of(service: Service, submit: Callable[..., str]) -> None:
    slow = [submit(n, user, priority=90) for n in range(3) for user in ("alice", "bob")]
    urgent = submit(9, "carol", priority=1)
    assert queued(service)[0] == urgent
    soon = submit(8, "alice", priority=5)
    end(service, slow[0])
    assert queued(service)[:2] == [urgent, soon], "before what its owner asked for earlier"
    assert service.status(urgent, "carol").place == 1


def test_the_queue_and_the_day_are_full_one_time(service: Service, submit: Callable[..., str]) -> None:
    limits = Limits(queued=3, jobs_per_day=2)
    service._board.limits = limits
    jobs = [submit(1, user) for user in ("alice", "bob", "carol")]
    with pytest.raises(LimitError, match="the queue is full: 3 jobs"):
        submit(1, "dave")
    end(service, jobs[0])
    end(service, submit(2, "alice"))
    with pytest.raises(LimitError, match="2 jobs in 24 hours"):
        submit(3, "alice")


CALLS: list[Callable[[Service, str], Any]] = [
    lambda s, job: s.status(job, "bob"),
    lambda s, job: s.events(job, "bob"),
    lambda s, job: s.cancel(job, "bob"),
    lambda s, job: s.resume(job, "bob", TOKENS["bob"]),
    lambda s, job: s.retry(job, "bob", TOKENS["bob"]),
    lambda s, job: s.delete(job, "bob"),
    lambda s, job: s.report(job, "bob"),
    lambda s, job: s.card(job, "bob"),
    lambda s, job: s.result(job, "bob"),
    lambda s, job: s.figures(job, "bob"),
    lambda s, job: s.publish(job, "bob", TOKENS["bob"]),
]


def test_nobody_sees_or_touches_jobs_of_others(service: Service, submit: Callable[..., str]) -> None:
    """Every call, whether the job exists or not: the same words."""
    job = submit(1)
    for call in CALLS:
        for asked in (job, "0" * 32, "' OR 1=1 --", "../../etc"):
            with pytest.raises(JobError) as refused:
                call(service, asked)
            assert refused.value.message == "there is no such job"
    assert service.jobs("bob") == []
    assert [found.id for found in service.jobs("alice")] == [job]
    assert service.status(job, "alice").state == "queued"
    public = {name for name in vars(Service) if not name.startswith("_")}
    by_job = {
        "status",
        "events",
        "cancel",
        "resume",
        "retry",
        "delete",
        "report",
        "card",
        "result",
        "figures",
        "publish",
    }
    others = {"preview", "inspect", "block", "hardware", "submit", "jobs", "warm", "close"}
    assert public - by_job == others, "a new call? test it here"


def test_a_job_goes_through_its_states(service: Service, submit: Callable[..., str]) -> None:
    job = submit(1, review=True)
    with pytest.raises(JobError, match="this job is queued"):
        service.resume(job, "alice", TOKENS["alice"])
    with pytest.raises(JobError, match="cancel it first"):
        service.delete(job, "alice")
    service.cancel(job, "alice")
    assert service._queue.states([(job, 1)])[job][0] == "CANCELLED"
    with pytest.raises(JobError, match="this job is cancelled"):
        service.cancel(job, "alice")
    assert service.vault.take(job) is None
    with pytest.raises(TokenError, match="was forgotten"):
        service.resume(job, "alice")
    assert service.resume(job, "alice", TOKENS["alice"]).attempt == 2
    assert queued(service) == [job]
    end(service, job, "review")
    assert service._board.find(job)["released"] is False  # type: ignore[index]
    service.resume(job, "alice", TOKENS["alice"])
    assert service._board.find(job)["released"] is True  # type: ignore[index]
    end(service, job)
    assert service.retry(job, "alice", TOKENS["alice"]).attempt == 4
    assert service._board.find(job)["released"] is False, "a new result, a new look"  # type: ignore[index]
    end(service, job, "failed")
    states = [event.data["state"] for event in service.events(job, "alice") if event.kind == "state"]
    first, again = ["queued", "cancelled"], ["queued", "running"]
    assert states == [*first, *again, "review", *again, "done", *again, "failed"]
    numbers = [event.number for event in service.events(job, "alice")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert [event.number for event in service.events(job, "alice", since=9)] == [10, 11]
    service.delete(job, "alice")
    assert service.jobs("alice") == []
    assert service._queue._client.list_workflows(workflow_ids=[workflow_id(job, 1)]) == []


def test_what_was_decided_about_a_job_cannot_be_undone_by_its_worker(
    service: Service, submit: Callable[..., str]
) -> None:
    job = submit(1)
    old = Claim(job, 1, "w")
    working(service).take(old, "here")
    assert working(service).wanted(old)
    assert not working(service).wanted(replace(old, worker="other")), "it is another worker's"
    service.cancel(job, "alice")
    assert not working(service).wanted(old)
    working(service).note(old, [("log", {"text": "late"})], card="late")
    working(service).finish(old, "done")
    assert service.status(job, "alice").state == "cancelled"
    assert service.card(job, "alice") is None
    service.resume(job, "alice", TOKENS["alice"])
    assert working(service).take(old, "here") is None
    assert working(service).take(Claim(job, 2, "w"), "here") is not None
    assert working(service).take(Claim(job, 2, "v"), "elsewhere") is None, "its files are out of reach there"
    moved = service.status(job, "alice")
    assert (moved.attempt, moved.state) == (3, "queued")
    assert queued(service)[-1] == job
    assert service.vault.take(job) is not None


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": "../x"}, RequestError, "namespace/name"),
    ({"model": "a/b/c"}, RequestError, "namespace/name"),
    ({"model": "https://evil.example/a"}, RequestError, "namespace/name"),
    ({"model": "a/b\n"}, RequestError, "namespace/name"),
    ({"model": "-a/b"}, RequestError, "namespace/name"),
    ({"target": "alice/..."}, RequestError, "namespace/name"),
    ({"target": "alice/x;rm -rf"}, RequestError, "namespace/name"),
    ({"revision": "../../x"}, RequestError, "a branch, a tag or a commit"),
    ({"recipe": "/etc/passwd"}, RecipeError, "not a recipe's name"),
    ({"recipe": "../x.yaml"}, RecipeError, "not a recipe's name"),
    ({"recipe": "x.yaml"}, RecipeError, "file cannot be read"),
    ({"recipe": {"steps": [], "x": "y" * 200_000}}, RequestError, "shorter than"),
    ({"changes": ["calibration.source=/etc/passwd"]}, RecipeError, "calibration from `/etc/passwd`"),
    ({"changes": ["calibration.source=http://10.0.0.1/x"]}, RecipeError, "calibration from"),
    ({"changes": ["x=" + "y" * 1000]}, RequestError, "at most 500"),
    ({"calibration_text": "x" * 1_000_001}, RequestError, "1000000"),
    ({"calibration_text": " \n", "recipe": "rtn-w8a8static"}, RequestError, "is empty"),
    ({"changes": ["calibration.samples=0"], "recipe": "rtn-w8a8static"}, RecipeError, "greater than or equal to 1"),
    ({"executor": "shell"}, RequestError, "executor"),
    ({"priority": 0}, RequestError, "priority"),
    ({"max_usd": 3.0}, RequestError, "hf-jobs"),
    ({"executor": "hf-jobs", "target": None}, RequestError, "needs a `target`"),
    ({"shell": "x"}, RequestError, "unknown key `shell`"),
]


@pytest.mark.parametrize(("more", "error", "words"), BAD, ids=[str(b[0])[:40] for b in BAD])
def test_requests_that_are_refused(more: dict[str, Any], error: type[Exception], words: str) -> None:
    """Paths, addresses, and what could never be: refused before anything is asked or written."""
    from hfquant.conversion.request import Request

    wish = {"model": "alice/model", "revision": COMMIT, "recipe": "rtn-w4g32", "target": "alice/r"} | more
    with pytest.raises(error, match=words):
        Request.parse(wish).chosen()


def test_a_push_needs_a_token_that_is_good_for_a_while(service: Service) -> None:
    wish = {"model": "alice/model", "revision": COMMIT, "recipe": "rtn-w4g32", "target": "alice/r"}
    with pytest.raises(TokenError, match="needs a token"):
        service.submit(wish, "alice")
    with pytest.raises(TokenError, match="has expired"):
        service.submit(wish, "alice", TOKENS["alice"], expires=service._board.now() + 10)
    with pytest.raises(RequestError, match="needs an owner"):
        service.submit(wish, "", TOKENS["alice"])
    assert service.jobs("alice") == []
