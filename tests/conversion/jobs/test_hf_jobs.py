"""Work on the Hub's machines: the real calls, to a Hub whose Jobs are processes of this machine."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from hfquant import __version__
from hfquant.conversion import remote
from hfquant.conversion.executors.hf_jobs import MARK, HfJobs, hardware, price
from hfquant.conversion.executors.local import Local
from hfquant.conversion.job import REMOTE_STEPS
from hfquant.conversion.settings import Settings
from hfquant.conversion.worker import Worker
from hfquant.errors import LimitError, RequestError
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub, Job

from .conftest import Desk, wait, weights
from .forks import Forked, start
from .test_crash import die

Calm = Callable[[str], dict[str, str]]


def quick(worker: Worker) -> None:
    executors: Any = worker.conversions.tools.executors
    executors["hf-jobs"] = HfJobs(interval=0.2)


class Machines:
    """Runs what is posted as the Hub would: with the Job's own environment and secrets."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.processes = desk, list[Forked]()
        desk.hub.jobs.begun = self.begin

    def begin(self, job: Job) -> None:
        log = self.desk.folder / f"job-{job.id}.log"

        def run() -> None:
            os.environ.update(job.spec["environment"] | job.spec["secrets"])
            remote.Local = lambda limits, memory: Local(limits, 4_000_000_000, start)  # type: ignore[assignment,misc]
            raise SystemExit(remote.main())

        process = Forked(run, log)
        self.processes.append(process)
        job.lines = lambda: log.read_text().splitlines() if log.exists() else []
        threading.Thread(target=self.watch, args=(job, process), daemon=True).start()

    def watch(self, job: Job, process: Forked) -> None:
        code = process.wait(300)
        job.stage = "COMPLETED" if code == 0 else "ERROR"

    def close(self) -> None:
        for process in self.processes:
            process.kill()


@pytest.fixture
def machines(desk: Desk) -> Iterator[Machines]:
    made = Machines(desk)
    yield made
    made.close()


def submit(desk: Desk, **more: Any) -> str:
    return desk.submit(executor="hf-jobs", hardware="a10g-small", max_usd=2.0, **more)


def test_one_job_though_the_worker_dies_twice(desk: Desk, machines: Machines, calm: Calm) -> None:
    """Killed when the Hub has begun the Job and the worker has not heard of it, and again while it waits for it."""

    def before_it_hears(worker: Worker) -> None:
        quick(worker)
        begin = HfJobs._begin

        def deaf(self: HfJobs, *arguments: Any) -> str:
            begin(self, *arguments)
            die()
            raise AssertionError

        HfJobs._begin = deaf  # type: ignore[method-assign]

    job = submit(desk)
    assert desk.work(before_it_hears).wait() == -signal.SIGKILL
    assert len(desk.hub.jobs.all) == 1
    waiting = desk.work(quick)
    wait(lambda: desk.job(job).progress.layers_done > 0)
    waiting.kill()
    desk.work(quick)
    done = desk.ended(job)
    assert (done.state, done.failure, done.attempt) == ("done", None, 1)
    assert [step.name for step in done.steps] == list(REMOTE_STEPS)
    assert weights(desk.arrived("alice/small")) == calm("rtn")
    assert desk.commits("alice/small") == 1
    (ran,) = desk.hub.jobs.all
    assert ran.spec["flavor"] == "a10g-small"
    assert 600 < ran.spec["timeoutSeconds"] <= 2.0 / (0.016667 * 60) * 3600, "no longer than the money lasts"
    assert "hfquant" in ran.spec["labels"]
    # the token is a secret of the Job, and in nothing else of it
    assert ran.spec["secrets"] == {"HF_TOKEN": TOKENS["alice"]}
    assert TOKENS["alice"] not in str({key: value for key, value in ran.spec.items() if key != "secrets"})
    assert TOKENS["alice"] not in "\n".join(ran.lines())
    # what it told is told here, each thing once; report and card are what was pushed
    layers = [e.data["name"] for e in desk.service.events(job, "alice") if e.kind == "layer"]
    assert len(layers) == len(set(layers)) == 21
    card = desk.service.card(job, "alice")
    assert card is not None
    assert card.encode() == (desk.hub.store.folder / desk.arrived("alice/small")["README.md"]).read_bytes()
    figures = desk.service.figures(job, "alice")
    assert sorted(figures) == ["figures/bits.png", "figures/layer-error.png"]
    assert all(content.startswith(b"\x89PNG") for content in figures.values())
    assert desk.rooms() == []


def test_cancelled(desk: Desk) -> None:
    desk.hub.jobs.begun = lambda job: None
    job = submit(desk)
    desk.work(quick)
    wait(lambda: desk.hub.jobs.all)
    wait(lambda: desk.service._board.find(job)["handle"])  # type: ignore[index]
    desk.service.cancel(job, "alice")
    wait(lambda: desk.hub.jobs.all[0].stage == "CANCELED", 5)
    assert desk.job(job).state == "cancelled"


FAILURES = [
    (
        "ERROR",
        [f'{MARK}{{"event": "failed", "kind": "QualityError", "message": "too bad", "hint": "more bits"}}'],
        ("QualityError", "too bad"),
    ),
    ("ERROR", ["Traceback", "ImportError: x"], ("HubError", "the Job ended as ERROR: out of money")),
    ("COMPLETED", [], ("HubError", "the Job ended as COMPLETED: out of money")),
]


def test_how_jobs_end(desk: Desk) -> None:
    """Each end in words; what a Job prints is a log, and only lines that are meant as events are events."""
    ends = iter(FAILURES)

    def begun(made: Job) -> None:
        stage, lines, _ = next(ends)
        forged = ["hfquant: {broken", 'hfquant: ["done"]', 'say hfquant: {"event": "done"}']
        made.stage, made.message, made.lines = stage, "out of money", lambda: [*forged, *lines]

    desk.hub.jobs.begun = begun
    desk.work(quick)
    for n, (_, _, expected) in enumerate(FAILURES):
        job = submit(desk, target=f"alice/r{n}")
        failed = desk.ended(job)
        assert failed.failure is not None
        assert (failed.failure.kind, failed.failure.message) == expected
    assert len(desk.hub.jobs.all) == 3


def test_what_a_machine_installs_can_be_named(desk: Desk) -> None:
    """This version from the package index; or what whoever runs the service built."""
    assert desk.settings.package == f"hfquant=={__version__}"
    wheel = "hfquant @ https://hub.example/hfquant-0.1.0-py3-none-any.whl"
    assert Settings.read({"HFQUANT_PACKAGE": wheel, "HFQUANT_FOLDER": str(desk.folder)}).package == wheel
    desk.settings = replace(desk.settings, package=wheel)
    desk.hub.jobs.begun = lambda job: None
    submit(desk)
    desk.work()
    wait(lambda: desk.hub.jobs.all)
    (begun,) = desk.hub.jobs.all
    assert begun.spec["command"][:5] == ["uv", "run", "--no-project", "--with", wheel]


def test_prices(hub: Hub) -> None:
    kinds = hardware(TOKENS["alice"])
    assert [kind.name for kind in kinds] == ["cpu-basic", "a10g-small"], "cheapest first"
    assert kinds[1].usd_per_hour == pytest.approx(1.0, rel=1e-3)
    assert kinds[1].accelerator == "1 x A10G"
    usd, seconds = price(kinds, "a10g-small", 3600, most=10)
    assert (usd, seconds) == (pytest.approx(1 + 600 / 3600, rel=1e-3), 3600)
    usd, seconds = price(kinds, "a10g-small", 10 * 3600, most=2)
    assert (usd, seconds) == (pytest.approx(2), pytest.approx(2 * 3600 - 600, rel=1e-3))
    with pytest.raises(LimitError, match=r"0\.10 USD buy 6 minutes"):
        price(kinds, "a10g-small", 3600, most=0.1)
    with pytest.raises(RequestError, match="no hardware `h900`"):
        price(kinds, "h900", 3600, most=1)


def test_a_preview_tells_the_price(desk: Desk) -> None:
    wish = desk.request(executor="hf-jobs", hardware="a10g-small", max_usd=3.0)
    found = desk.service.preview(wish, token=TOKENS["alice"])
    assert found.problems == ()
    assert found.usd == pytest.approx(3.0)
    assert [kind.name for kind in desk.service.hardware(TOKENS["alice"])] == ["cpu-basic", "a10g-small"]
