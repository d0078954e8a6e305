"""A service on a database and a Hub of its own, with a small model on it; workers are forks of this process."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from hfquant import report
from hfquant.conversion import tasks
from hfquant.conversion.job import Job
from hfquant.conversion.redact import log_to_stderr
from hfquant.conversion.service import Service
from hfquant.conversion.settings import Limits, Measuring, Settings
from hfquant.conversion.worker import Worker
from hfquant.measure import card
from tests.compress.folders import digests
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub

from .forks import Forked, start

RECIPE = {"steps": [{"method": "rtn"}], "grid": "w4g32", "gate": {"max_ppl_ratio": None}}
CALIBRATED = {
    "steps": [{"method": "gptq"}], "grid": "w4g32", "calibration": {"samples": 8, "seq_len": 64},
    "gate": {"max_ppl_ratio": None},
}  # fmt: skip


def wait(holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Until something holds; what it was."""
    until = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < until, f"{holds} does not come true"
        time.sleep(0.02)
    return found


MEASURING = Measuring(windows=2, window_len=32, new_tokens=2)


@dataclass
class Desk:
    """Everything that a test of the service needs."""

    hub: Hub
    settings: Settings
    service: Service
    folder: Path
    made: Path
    workers: list[Forked] = field(default_factory=list)

    def request(self, target: str | None = "alice/small", recipe: Any = RECIPE, **more: Any) -> dict[str, Any]:
        return {"model": "alice/model", "recipe": recipe, "target": target, **more}

    def submit(self, user: str = "alice", **request: Any) -> str:
        return self.service.submit(self.request(**request), user, TOKENS[user]).id

    def work(
        self, prepare: Callable[[Worker], None] = lambda worker: None, *, real: bool = True, **settings: Any
    ) -> Forked:
        """Begin a worker in a process of its own.  prepare: changes it there.  real: whether it compresses anything."""

        def run() -> None:
            os.environ.pop("HF_TOKEN", None)
            log_to_stderr()
            worker = Worker(self.settings, **{"begin": start, "beat": 0.1, "poll": 0.05, **settings})
            signal.signal(signal.SIGTERM, worker.stop)
            if not real:
                pretend(self.made)
            prepare(worker)
            worker.run()

        self.workers.append(Forked(run, self.folder / "worker.log"))
        return self.workers[-1]

    def job(self, job: str, user: str = "alice") -> Job:
        return self.service.status(job, user)

    def ended(self, job: str, user: str = "alice", seconds: float = 60.0) -> Job:
        """The job, when it has ended."""
        try:
            wait(lambda: self.job(job, user).is_final or all(w.poll() is not None for w in self.workers), seconds)
        except AssertionError:
            print((self.folder / "worker.log").read_text(), self.job(job, user))
            raise
        found = self.job(job, user)
        assert found.is_final, f"no worker is left:\n{log(self)}"
        return found

    def arrived(self, repo: str, revision: str = "main") -> dict[str, str]:
        files = self.hub.store.repos[repo].resolve(revision).files
        return {path: blob.sha256 for path, blob in files.items() if path != ".gitattributes"}

    def commits(self, repo: str) -> int:
        return len(list(self.hub.store.repos[repo].history("main"))) - 1

    def rooms(self) -> list[str]:
        """The folders of jobs that are left."""
        return [path.name for path in (self.settings.folder / "jobs").iterdir()]

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()
        self.service.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        database=f"sqlite:///{tmp_path / 'service' / 'jobs.sqlite'}",
        folder=tmp_path / "service",
        secret=Fernet.generate_key().decode(),
        limits=Limits(memory=4_000_000_000, jobs_per_day=1000),
        measuring=MEASURING,
    )


@pytest.fixture
def model(built: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder to change before it is put on the Hub."""
    return Path(shutil.copytree(built("llama"), tmp_path / "model"))


@pytest.fixture(scope="session")
def made(built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """made("rtn") -> the folder of the small model compressed in peace, without any service."""

    @cache
    def make(name: str) -> Path:
        task = {
            "source": str(built("llama")), "out": str(tmp_path_factory.mktemp("calm") / name), "model": "alice/model",
            "revision": "0" * 40, "facts": {}, "recipe": {"rtn": RECIPE, "gptq": CALIBRATED}[name], "memory": None,
            "text": None, "measuring": asdict(MEASURING),
        }  # fmt: skip
        tasks.do_compress(task, lambda event: None, BytesIO())
        tasks.do_evaluate(task, lambda event: None, BytesIO())
        return Path(task["out"])

    return make


@pytest.fixture(scope="session")
def calm(made: Callable[[str], Path]) -> Callable[[str], dict[str, str]]:
    """calm("rtn") -> the hashes of `made("rtn")`, of what is the same in every run."""
    return cache(lambda name: weights(digests(made(name))))


def pretend(made: Path) -> None:
    """In a worker's process, where something else is looked at: the work is to copy what was made before."""

    def compress(task: Mapping[str, Any], tell: Callable[[Any], None], _: Any) -> dict[str, Any]:
        if not Path(task["out"]).exists():
            shutil.copytree(made, task["out"])
            (Path(task["out"]) / "report.json").write_text(json.dumps(report.read(made) | {"gate": None}))
        return {}

    def evaluate(task: Mapping[str, Any], tell: Callable[[Any], None], _: Any) -> dict[str, Any]:
        out, known = Path(task["out"]), report.read(made)
        source = {**known["source"], **task["facts"], "revision": task["revision"]}
        card.write(out, report.merge(out, source=source, gate=known["gate"]))
        return {}

    tasks.TASKS |= {"compress": compress, "evaluate": evaluate}


@pytest.fixture
def desk(
    hub: Hub, made: Callable[[str], Path], settings: Settings, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Desk]:  # fmt: skip
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    hub.store.upload("alice/model", model)
    monkeypatch.delenv("HF_TOKEN")
    found = Desk(hub, settings, Service(settings, begin=start), tmp_path, made("rtn"))
    yield found
    found.close()


def weights(files: dict[str, str]) -> dict[str, str]:
    """Those files that are the same in every run, in whatever order the errors in figures were summed."""
    told = ("report.json", "README.md", "hfquant.json", "figures/")
    return {name: sha for name, sha in files.items() if not name.startswith(told)}


def log(desk: Desk) -> str:
    return (desk.folder / "worker.log").read_text()


__all__ = ["CALIBRATED", "RECIPE", "Desk", "json", "log", "wait", "weights"]
