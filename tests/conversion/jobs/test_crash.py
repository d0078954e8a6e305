"""A worker that is killed anywhere: another goes on, and it ends in the same bytes, one commit, nothing left behind."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from hfquant.compress import LayerResult, Plan, compress
from hfquant.conversion import tasks
from hfquant.conversion.claims import Claim
from hfquant.conversion.database import tokens
from hfquant.conversion.job import LOCAL_STEPS
from hfquant.conversion.steps import Steps
from hfquant.conversion.worker import Worker

from .conftest import CALIBRATED, RECIPE, Desk, log, wait, weights

Calm = Callable[[str], dict[str, str]]
POINTS = [(name, when) for name in LOCAL_STEPS for when in ("before", "after")]


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(name: str, when: str) -> Callable[[Worker], None]:
    """Makes a worker kill itself before a step, or behind it, when it is done but not yet written down."""

    def prepare(_: Worker) -> None:
        run = Steps.run

        def patched(self: Steps, step: str) -> dict[str, Any]:
            if (step, when) == (name, "before"):
                die()
            found = run(self, step)
            if (step, when) == (name, "after"):
                die()
            return found

        Steps.run = patched  # type: ignore[method-assign]  # in a process that ends with it

    return prepare


def pause(_: Worker) -> None:
    """The first child waits in its second block: with a small model it could be done before its worker heard of it."""
    go_on = compress

    def patched(todo: Plan) -> Iterator[LayerResult]:
        for layer in go_on(todo):
            yield layer
            if layer.block == 1 and not todo.resumed:
                time.sleep(60)

    tasks.compress = patched  # type: ignore[attr-defined, assignment]  # in a process that ends with it, and in its children


def assert_as_in_peace(desk: Desk, job: str, calm: dict[str, str], attempt: int = 1) -> None:
    done = desk.ended(job)
    assert (done.state, done.failure, done.attempt) == ("done", None, attempt)
    assert weights(desk.arrived("alice/small")) == calm
    assert desk.commits("alice/small") == 1
    assert desk.rooms() == []
    with desk.service._database.read() as connection:
        assert connection.execute(sa.select(tokens)).all() == []


def test_killed_at_every_boundary_in_turn(desk: Desk, calm: Calm) -> None:
    """One job, and a worker for every step, killed when it is done and nobody knows; the last one lives."""
    job = desk.submit()
    for name in LOCAL_STEPS:
        assert desk.work(dying(name, "after")).wait() == -signal.SIGKILL, name
        assert not desk.job(job).is_final
    desk.work()
    assert_as_in_peace(desk, job, calm("rtn"))
    assert {step.state for step in desk.job(job).steps} <= {"done", "skipped"}


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS, ids="-".join)
def test_killed_at_one_boundary(desk: Desk, calm: Calm, point: tuple[str, str]) -> None:
    job = desk.submit()
    assert desk.work(dying(*point)).wait() == -signal.SIGKILL
    desk.work()
    assert_as_in_peace(desk, job, calm("rtn"))


def layers(desk: Desk, job: str) -> list[dict[str, Any]]:
    return [dict(event.data) for event in desk.service.events(job, "alice") if event.kind == "layer"]


def plans(desk: Desk, job: str) -> list[int]:
    """How many blocks were finished each time the compression began."""
    return [event.data["resumed"] for event in desk.service.events(job, "alice") if event.kind == "plan"]


RECIPES = [pytest.param("rtn", RECIPE), pytest.param("gptq", CALIBRATED, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_killed_while_compressing(desk: Desk, calm: Calm, name: str, recipe: Any) -> None:
    """The child dies with its worker, and the next one goes on behind the last finished block."""

    def prepare(worker: Worker) -> None:
        pause(worker)
        note = worker.claims.note

        def patched(claim: Claim, happened: Any, **changes: Any) -> None:
            note(claim, happened, **changes)
            if any(kind == "layer" and data["block"] == 1 for kind, data in happened):
                die()

        worker.claims.note = patched  # type: ignore[method-assign]

    job = desk.submit(recipe=recipe)
    assert desk.work(prepare).wait() == -signal.SIGKILL
    before = len(layers(desk, job))
    assert before >= 8
    desk.work()
    assert_as_in_peace(desk, job, calm(name))
    first, second = plans(desk, job)
    assert (first, second >= 1) == (0, True)


@pytest.mark.parametrize("disk", ["kept", "lost"])
def test_a_machine_that_is_gone(desk: Desk, calm: Calm, monkeypatch: pytest.MonkeyPatch, disk: str) -> None:
    """Everything on it dies at once, in the middle of the compression; a machine of another name has the database.

    On the same disk it goes on behind the last finished block; without the disk the job begins anew there.
    """

    job = desk.submit()
    first = desk.work(pause, dead=1.0)
    wait(lambda: any(layer["block"] == 1 for layer in layers(desk, job)))
    machine = [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]
    assert len(machine) == 2, "the worker, and what does the work"
    for process in machine:
        process.kill()
    assert first.wait() == -signal.SIGKILL
    monkeypatch.setattr("hfquant.conversion.presence.socket.gethostname", lambda: "another-machine")
    if disk == "lost":
        desk.settings = replace(desk.settings, folder=desk.folder / "another-disk")
    desk.work(dead=1.0)
    assert_as_in_peace(desk, job, calm("rtn"), attempt=1 if disk == "kept" else 2)
    begun = plans(desk, job)
    assert (begun[0], begun[1] >= 1) == (0, disk == "kept")
    told = log(desk)
    assert "worker another-machine-" in told
    assert "is dead" in told


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_a_child_that_is_killed_fails_its_job_and_resuming_goes_on(
    desk: Desk, calm: Calm, name: str, recipe: Any
) -> None:
    def prepare(worker: Worker) -> None:
        pause(worker)
        local = worker.conversions.tools.executors["local"]
        poll = local.poll

        def patched(task: Any, handle: str) -> Any:
            found = poll(task, handle)
            if any(event["event"] == "layer" and event["block"] == 1 for event in found.events):
                os.kill(local._running[handle].child.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
                local.poll = poll  # type: ignore[method-assign]
            return found

        local.poll = patched  # type: ignore[method-assign]

    job = desk.submit(recipe=recipe)
    desk.work(prepare)
    failed = desk.ended(job)
    assert failed.failure is not None
    assert "was killed" in failed.failure.message
    assert failed.step is None
    desk.service.resume(job, "alice", "hf_" + "a" * 34)
    done = desk.ended(job)
    assert (done.state, done.attempt) == ("done", 2)
    assert weights(desk.arrived("alice/small")) == calm(name)
    assert plans(desk, job)[1] >= 1


@pytest.mark.parametrize("kind", ["lost", pytest.param("down", marks=pytest.mark.slow)])
def test_killed_while_pushing(desk: Desk, calm: Calm, kind: Any) -> None:
    """At the commit: when the Hub made it and the worker never heard, and when it never arrived."""
    job = desk.submit()
    worker = desk.work(real=False)

    def commit(method: str, path: str) -> bool:
        if method == "POST" and "/commit/" in path:
            worker.kill()
            return True
        return False

    desk.hub.faults.add(kind, matches=commit)
    assert worker.wait() == -signal.SIGKILL
    desk.hub.faults.clear()
    desk.work(real=False)
    assert_as_in_peace(desk, job, calm("rtn"))


def test_a_worker_that_was_taken_for_dead_leaves_its_jobs_alone(desk: Desk, calm: Calm) -> None:
    """It gave no sign for too long while it worked on; others have its job now, and it ends before they begin."""

    def prepare(worker: Worker) -> None:
        sign = worker.presence.sign

        def late() -> bool:
            if worker.conversions.running:
                time.sleep(3)
            return sign()

        worker.presence.sign = late  # type: ignore[method-assign]

    job = desk.submit()
    late = desk.work(prepare, dead=1.0)
    wait(lambda: desk.job(job).step == "compress")
    desk.work(dead=1.0)
    assert late.wait() == 1
    assert_as_in_peace(desk, job, calm("rtn"))
    assert "took this worker for dead" in log(desk)


@pytest.mark.slow
def test_asked_to_stop_it_leaves_the_job_for_the_next_one(desk: Desk, calm: Calm) -> None:
    job = desk.submit()
    worker = desk.work()
    wait(lambda: desk.job(job).step == "compress")
    worker.kill(signal.SIGTERM)
    assert worker.wait() == 0
    assert desk.job(job).state == "running"
    desk.work()
    assert_as_in_peace(desk, job, calm("rtn"))
