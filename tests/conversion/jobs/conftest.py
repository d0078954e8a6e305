"""A service on a database and a Hub of its own, with a small model on it; workers are forks of this process."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from hfquant.compress import compress
from hfquant.conversion.job import Job
from hfquant.conversion.redact import log_to_stderr
from hfquant.conversion.service import Service
from hfquant.conversion.settings import Limits, Measuring, Settings
from hfquant.conversion.worker import Worker
from hfquant.measure.verify import verify
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


@dataclass
class Desk:
    """Everything that a test of the service needs."""

    hub: Hub
    settings: Settings
    service: Service
    folder: Path
    workers: list[Forked] = field(default_factory=list)

    def request(self, target: str | None = "alice/small", recipe: Any = RECIPE, **more: Any) -> dict[str, Any]:
        return {"model": "alice/model", "recipe": recipe, "target": target, **more}

    def submit(self, user: str = "alice", **request: Any) -> str:
        return self.service.submit(self.request(**request), user, TOKENS[user]).id

    def work(self, prepare: Callable[[Worker], None] = lambda worker: None, **settings: Any) -> Forked:
        """Begin a worker in a process of its own.  prepare: changes it there."""

        def run() -> None:
            os.environ.pop("HF_TOKEN", None)
            log_to_stderr()
            worker = Worker(self.settings, **{"begin": start, "beat": 0.1, "poll": 0.05, **settings})
            signal.signal(signal.SIGTERM, worker.stop)
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
        measuring=Measuring(windows=2, window_len=32, new_tokens=2),
    )


@pytest.fixture
def model(built: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder to change before it is put on the Hub."""
    return Path(shutil.copytree(built("llama"), tmp_path / "model"))


@pytest.fixture(scope="session")
def calm(built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """calm("rtn") -> the hashes of the small model compressed in peace, without any service."""

    @cache
    def make(name: str) -> dict[str, str]:
        out = tmp_path_factory.mktemp("calm") / name
        for _ in compress(built("llama"), {"rtn": RECIPE, "gptq": CALIBRATED}[name], out):
            pass
        verify(out, windows=2, window_len=32, new_tokens=2, enforce=False)
        return weights(digests(out))

    return make


@pytest.fixture
def desk(
    hub: Hub,
    calm: Callable[[str], dict[str, str]],
    settings: Settings,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Desk]:
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    hub.store.upload("alice/model", model)
    calm("rtn")  # whatever this imports, forks have
    monkeypatch.delenv("HF_TOKEN")
    made = Desk(hub, settings, Service(settings, begin=start), tmp_path)
    yield made
    made.close()


def weights(files: dict[str, str]) -> dict[str, str]:
    """Those files that are the same in every run."""
    return {name: sha for name, sha in files.items() if name not in ("report.json", "README.md", "hfquant.json")}


def log(desk: Desk) -> str:
    return (desk.folder / "worker.log").read_text()


__all__ = ["CALIBRATED", "RECIPE", "Desk", "json", "log", "wait", "weights"]
