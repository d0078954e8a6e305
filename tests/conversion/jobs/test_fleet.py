"""A fleet from its file to the Hub, as a publisher runs it: the command line asks, workers without a login do the work.

The small one copies what was made before; the one of twelve compresses, measures and pushes every pair.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from fastapi import FastAPI
from starlette.testclient import TestClient
from typer.testing import CliRunner

from hfquant.cli import app
from hfquant.conversion.database import tokens
from hfquant.conversion.executors.local import Local
from hfquant.conversion.fleet.serve import attached
from hfquant.conversion.fleet.webhook import HEADER, PATH
from hfquant.conversion.job import Job
from hfquant.conversion.settings import Limits, Settings
from hfquant.conversion.worker import Worker
from tests.hub.fixtures import TOKENS

from .conftest import CALIBRATED, RECIPE, Desk, log, wait

SECRET = "0123456789abcdef0123"
MODELS = ("llama", "gpt2", "opt", "qwen2")
RECIPES: dict[str, Any] = {
    "rounded": RECIPE,
    "gptq": CALIBRATED,
    "pruned": CALIBRATED | {"steps": [{"method": "sparsegpt", "pattern": "2of4"}, {"method": "rtn"}]},
}


@dataclass
class Fleet:
    """A manifest of alice's, and everybody who works on it."""

    desk: Desk
    path: Path

    def write(self, *models: dict[str, Any], **recipes: Any) -> None:
        data = {"version": 1, "defaults": {"namespace": "alice"}, "recipes": recipes, "models": list(models)}
        self.path.write_text(yaml.safe_dump(data))

    def run(self, *words: str, code: int = 0) -> Any:
        """`hfquant fleet WORDS`, and what it prints."""
        done = CliRunner().invoke(app, ["fleet", *words, "--manifest", str(self.path), "--json"])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    def verdicts(self, code: int = 0) -> dict[str, str]:
        """Of every pair, by its target; code: 2 where anything differs from what is wanted."""
        return {pair["target"]: pair["verdict"] for pair in self.run("plan", code=code)["pairs"]}

    def apply(self, code: int = 0) -> list[str]:
        """The jobs that were asked for."""
        return [asked["job"] for asked in self.run("apply", code=code)]

    def done(self, jobs: list[str]) -> list[Job]:
        return [self.desk.ended(job, seconds=600) for job in jobs]

    def heads(self) -> dict[str, str]:
        return {name: repo.resolve("main").sha for name, repo in self.desk.hub.store.repos.items()}

    def move(self, model: str) -> None:
        """Upstream makes a commit."""
        repo = self.desk.hub.store.repos[model]
        notes = {"NOTES.md": self.desk.hub.store.put(repo.resolve("main").sha.encode(), False)}
        repo.commit("refs/heads/main", "notes", "alice", notes)

    @contextmanager
    def webhook(self) -> Iterator[Callable[[str], int]]:
        """Within: delivers what the Hub tells of a model's newest commit -> the answer's status."""
        service, served = self.desk.service, FastAPI()
        with attached(self.path, service, SECRET, "alice", TOKENS["alice"]) as routes:
            served.include_router(routes)
            client = TestClient(served)

            def deliver(model: str) -> int:
                sha = self.heads()[model]
                message = {
                    "event": {"action": "update", "scope": "repo.content"},
                    "repo": {"type": "model", "name": model},
                    "updatedRefs": [{"ref": "refs/heads/main", "newSha": sha}],
                }
                return client.post(PATH, json=message, headers={HEADER: SECRET}).status_code

            yield deliver

    def jobs(self) -> list[Job]:
        return self.desk.service.jobs("alice", limit=1000)

    def sealed(self) -> int:
        """How many tokens are kept."""
        with self.desk.service._database.read() as connection:
            return len(connection.execute(sa.select(tokens)).all())


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Two jobs of a user at once, and a queue that holds a fleet."""
    limits = Limits(memory=4_000_000_000, jobs_per_day=1000, queued_per_user=1000, running_per_user=2)
    return replace(settings, limits=limits)


@pytest.fixture
def fleet(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    assert desk.settings.secret is not None
    for name, value in {
        "HFQUANT_DATABASE": desk.settings.database,
        "HFQUANT_FOLDER": str(desk.settings.folder),
        "HFQUANT_SECRET": desk.settings.secret,
        "HFQUANT_USER": "alice",
        "HF_TOKEN": TOKENS["alice"],  # the publisher's; workers are begun without it
    }.items():
        monkeypatch.setenv(name, value)
    return Fleet(desk, tmp_path / "fleet.yaml")


def test_a_small_fleet(fleet: Fleet) -> None:
    fleet.desk.hub.store.create("alice/model-foreign")
    theirs = fleet.desk.hub.store.put(b"not ours", False)
    fleet.desk.hub.store.repos["alice/model-foreign"].commit("refs/heads/main", "x", "alice", {"x": theirs})
    fleet.write({"id": "alice/model", "recipes": ["a", "b", "foreign"]}, a=RECIPE, b=RECIPE, foreign=RECIPE)
    made, before = ["alice/model-a", "alice/model-b"], fleet.heads()
    asked = fleet.apply()
    assert len(asked) == len(set(asked)) == fleet.sealed() == 2
    assert TOKENS["alice"].encode() not in (fleet.desk.settings.folder / "jobs.sqlite").read_bytes()
    assert fleet.apply() == [], "what waits is not asked for again"
    fleet.desk.work(real=False)
    assert [job.state for job in fleet.done(asked)] == ["done", "done"]
    assert fleet.sealed() == 0
    expected = dict.fromkeys(made, "up to date") | {"alice/model-foreign": "foreign"}
    assert fleet.verdicts(code=2) == expected
    assert fleet.apply() == []
    assert [fleet.desk.commits(repo) for repo in made] == [1, 1]

    fleet.move("alice/model")
    assert fleet.verdicts(code=2) == dict.fromkeys(made, "stale") | {"alice/model-foreign": "foreign"}
    with fleet.webhook() as deliver:
        assert [deliver("alice/model") for _ in range(3)] == [202] * 3
        wait(lambda: len(fleet.jobs()) == 4)
    fleet.done([job.id for job in fleet.jobs()])
    assert fleet.verdicts(code=2) == expected
    assert [fleet.desk.commits(repo) for repo in made] == [2, 2]
    assert len(fleet.jobs()) == 4
    assert fleet.heads()["alice/model-foreign"] == before["alice/model-foreign"]


def test_what_was_lost_on_the_hub_is_made_again(fleet: Fleet) -> None:
    """The job is done, and its result is gone: the same request, and yet there is something to do."""
    fleet.write({"id": "alice/model", "recipes": ["a"]}, a=RECIPE)
    asked = fleet.apply()
    fleet.desk.work(real=False)
    fleet.done(asked)
    assert fleet.verdicts() == {"alice/model-a": "up to date"}
    del fleet.desk.hub.store.repos["alice/model-a"]
    assert fleet.verdicts(code=2) == {"alice/model-a": "missing"}
    assert fleet.apply() == asked
    wait(lambda: fleet.done(asked)[0].attempt == 2)
    assert fleet.verdicts() == {"alice/model-a": "up to date"}
    assert fleet.sealed() == 0


def test_without_a_login_nothing_is_asked_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    fleet.write({"id": "alice/model", "recipes": ["a"]}, a=RECIPE)
    (asked,) = fleet.run("apply", code=2)
    assert asked["job"] is None
    assert "needs a token" in asked["error"]


def dying(worker: Worker) -> None:
    """Ends its process, as if by kill -9, when the first block of the fifth compression is finished."""
    local = worker.conversions.tools.executors["local"]
    assert isinstance(local, Local)
    poll, begun = local.poll, set[str]()

    def patched(task: Any, handle: str) -> Any:
        found = poll(task, handle)
        if task.name == "compress":
            begun.add(handle)
            if len(begun) >= 5 and any(event["event"] == "layer" and event["block"] >= 1 for event in found.events):
                os.kill(os.getpid(), signal.SIGKILL)
        return found

    local.poll = patched  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_fleet_of_twelve(fleet: Fleet, built: Callable[[str], Path]) -> None:
    store = fleet.desk.hub.store
    for model in MODELS:
        store.upload(f"alice/{model}", built(model))
    entries = [{"id": f"alice/{model}", "recipes": list(RECIPES)} for model in MODELS]
    targets = [f"alice/{model}-{recipe}" for model in MODELS for recipe in RECIPES]
    fleet.write(*entries, **RECIPES)

    # one apply converts all, through the death of its worker
    assert fleet.verdicts(code=2) == dict.fromkeys(targets, "missing")
    asked = fleet.apply()
    assert len(asked) == 12
    assert fleet.desk.work(dying, at_once=2).wait(600) == -signal.SIGKILL
    finished = [job.id for job in fleet.jobs() if job.state == "done"]
    assert 0 < len(finished) < 12
    kept = fleet.heads()
    fleet.desk.work(at_once=2)
    assert {(job.state, job.attempt) for job in fleet.done(asked)} == {("done", 1)}, log(fleet.desk)
    assert fleet.verdicts() == dict.fromkeys(targets, "up to date")
    assert [fleet.desk.commits(repo) for repo in targets] == [1] * 12
    assert kept.items() <= fleet.heads().items(), "what was finished was not done again"
    assert (fleet.desk.rooms(), fleet.sealed()) == ([], 0)

    # a second does nothing
    assert fleet.apply() == []
    assert len(fleet.jobs()) == 12

    # a moved original makes exactly its pairs stale, and a webhook converts just those
    before = fleet.heads()
    fleet.move("alice/opt")
    stale = [target for target in targets if "/opt-" in target]
    assert [target for target, verdict in fleet.verdicts(code=2).items() if verdict == "stale"] == stale
    with fleet.webhook() as deliver:
        assert [deliver("alice/opt") for _ in range(3)] == [202] * 3
        wait(lambda: len(fleet.jobs()) == 15)
    fleet.done([job.id for job in fleet.jobs()])
    assert fleet.verdicts() == dict.fromkeys(targets, "up to date")
    after = fleet.heads()
    assert sorted(name for name in after if after[name] != before[name]) == sorted([*stale, "alice/opt"])
    assert [fleet.desk.commits(repo) for repo in stale] == [2] * 3
    origin = json.loads((store.folder / fleet.desk.arrived(stale[0])["hfquant.json"]).read_text())
    assert origin["base"]["revision"] == after["alice/opt"]

    # a foreign repository is left alone; a failing gate pushes nothing, and is told
    store.upload("alice/llama-coarse", built("llama"))
    theirs = fleet.heads()["alice/llama-coarse"]
    coarse = RECIPE | {"grid": "w2g32", "gate": {"max_kl": 1e-9}}
    more = [{"id": f"alice/{model}", "recipes": ["coarse"]} for model in ("llama", "gpt2")]
    fleet.write(*entries, *more, **RECIPES, coarse=coarse)
    (job,) = fleet.apply()
    (failed,) = fleet.done([job])
    assert failed.failure is not None
    assert (failed.state, failed.failure.kind) == ("failed", "QualityError")
    pairs = {pair["target"]: pair for pair in fleet.run("status")["pairs"]}
    assert pairs["alice/llama-coarse"]["verdict"] == "foreign"
    assert pairs["alice/gpt2-coarse"]["verdict"] == "failed"
    assert "below its recipe's gate" in " ".join(pairs["alice/gpt2-coarse"]["reasons"])
    assert "alice/gpt2-coarse" not in store.repos
    assert fleet.heads()["alice/llama-coarse"] == theirs
    assert fleet.apply() == [], "it would end the same"
    assert [pairs[target]["verdict"] for target in targets] == ["up to date"] * 12
