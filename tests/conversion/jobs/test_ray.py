"""A fleet on a Ray cluster: nodes that share nothing but the Hub; one dies in the middle, and nothing is lost."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hfquant.conversion.executors import Task
from hfquant.conversion.executors.ray import OnRay, Runner, needs
from hfquant.conversion.fleet.manifest import Manifest
from hfquant.conversion.job import REMOTE_STEPS
from hfquant.conversion.workspace import Room
from hfquant.errors import HubError, RequestError
from hfquant.recipe_errors import validate
from tests.hub.fixtures import TOKENS

from .conftest import RECIPE, Desk, wait
from .test_fleet import Fleet, fleet, settings

__all__ = ["fleet", "settings"]


def test_hardware_is_cores_or_gpus() -> None:
    assert needs(None) == {"num_cpus": 1}
    assert needs("cpu-4") == {"num_cpus": 4}
    assert needs("gpu-2") == {"num_gpus": 2}
    for wrong in ("a10g-small", "gpu-0", "cpu-", "gpu-1;x"):
        with pytest.raises(RequestError, match="no hardware"):
            needs(wrong)


def test_fleets_may_name_it() -> None:
    entry = {"id": "org/model", "recipes": ["rtn-w8"]}
    terms = {"namespace": "acme", "executor": "ray", "flavor": "gpu-1"}
    found = validate(Manifest, {"version": 1, "defaults": terms, "models": [entry]}, "fleet")
    assert found.models[0].over(found.defaults).executor == "ray"
    with pytest.raises(Exception, match="max_usd"):
        validate(Manifest, {"version": 1, "defaults": terms | {"max_usd": 3}, "models": [entry]}, "fleet")


class Actor:
    """A `Runner` called as Ray calls it; dead: its node is gone and it is being begun again."""

    def __init__(self) -> None:
        self.runner = Runner()
        self.dead = False

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                return lambda: getattr(self.runner, name)(*args)

        return Method


class FakeRay:
    """Ray, as far as the executor asks for it."""

    class exceptions:
        class RayActorError(Exception): ...

        class ActorUnavailableError(RayActorError): ...

        class GetTimeoutError(Exception): ...

    def __init__(self) -> None:
        self.actors: dict[str, Actor] = {}
        self.killed: list[str] = []

    def remote(self, cls: type) -> Any:
        return self

    def options(self, **given: Any) -> Any:
        self.given = given
        return type("Begun", (), {"remote": lambda _: self.actors.setdefault(given["name"], Actor())})()

    def get_actor(self, name: str, namespace: str) -> Actor:
        return self.actors[name] if name in self.actors else self._none(name)

    def _none(self, name: str) -> Any:
        raise ValueError(name)

    def get(self, call: Any, timeout: float) -> Any:
        if any(actor.dead for actor in self.actors.values()):
            raise self.exceptions.ActorUnavailableError
        return call()

    def kill(self, actor: Actor) -> None:
        (name,) = [name for name, known in self.actors.items() if known is actor]
        del self.actors[name]
        self.killed.append(name)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    monkeypatch.setattr("hfquant.conversion.executors.ray.connected", lambda address: made)
    return made


def task(tmp_path: Path) -> Task:
    return Task("run", "j", "j-1-run", Room(tmp_path), {"model": "a/b"}, 60.0, "cpu-2", TOKENS["alice"])


def test_it_is_told_once_and_once_more_when_its_node_was_lost(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    ended = threading.Event()

    def convert(settings: Any, token: str, folder: Path, tell: Any) -> dict[str, Any]:
        told.append((settings, token))
        tell({"event": "progress", "text": "pushing"})
        if len(told) == 1:
            ended.wait()  # the node goes, and the thread with it
        return {"repo": "x/y"}

    monkeypatch.setattr("hfquant.conversion.remote.convert", convert)
    executor, work = OnRay(), task(tmp_path)
    handle = executor.start(work)
    assert executor.poll(work, handle).state == "running"
    assert ray.given["num_cpus"] == 2
    assert TOKENS["alice"] not in repr(ray.given), "Ray keeps what an actor is begun with"
    wait(lambda: len(told) == 1)
    (actor,) = ray.actors.values()
    actor.dead = True
    assert executor.poll(work, handle).state == "running"
    actor.runner, actor.dead = Runner(), False  # on another node
    handle = executor.poll(work, "j-1-run#17").handle or ""
    assert handle == "j-1-run#0"
    wait(lambda: actor.runner.poll(0)["state"] == "done")
    assert told == [({"model": "a/b"}, TOKENS["alice"])] * 2
    done = executor.poll(work, handle)
    assert (done.state, done.result, [e["text"] for e in done.events]) == ("done", {"repo": "x/y"}, ["pushing"])
    assert ray.killed == ["j-1-run"], "the actor goes, and its token with it"
    executor.cancel(work, handle)
    ended.set()


def test_failures_are_explained(ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(settings: Any, token: str, folder: Path, tell: Any) -> dict[str, Any]:
        raise HubError(f"{folder} is no place", f"not with {token}")

    monkeypatch.setattr("hfquant.conversion.remote.convert", convert)
    executor, work = OnRay(), task(tmp_path)
    executor.poll(work, executor.start(work))
    (actor,) = ray.actors.values()
    wait(lambda: actor.runner.poll(0)["state"] == "failed")
    failure = executor.poll(work, "j-1-run#0").failure
    assert failure is not None
    assert (failure.kind, failure.message) == ("HubError", "the job's folder is no place")
    assert TOKENS["alice"] not in str(failure.hint)


@pytest.fixture
def nodes(desk: Desk) -> Iterator[Any]:
    """A cluster whose nodes know this test's Hub.  They take their environment from whoever begins them."""
    pytest.importorskip("ray")
    from tests.compress.clusters import cluster

    told = {
        "HF_ENDPOINT": desk.hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        patch.delenv("HF_TOKEN", raising=False)
        with cluster(2, connect=False) as made:  # it is not asked, only begun
            yield made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_fleet_on_a_cluster_that_loses_a_node(fleet: Fleet, nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKENS["alice"])
    models = [{"id": "alice/model", "recipes": ["a", "b", "c"], "executor": "ray"}]
    fleet.write(*models, a=RECIPE, b=RECIPE | {"grid": "w8g32"}, c=RECIPE | {"grid": "w5g32"})
    asked = fleet.apply()
    assert len(asked) == 3

    def working() -> bool:
        """Both nodes compress something."""
        events = [fleet.desk.service.events(job, "alice") for job in asked]
        return sum(any(event.kind == "plan" for event in some) for some in events) == 2

    words = ["worker", "--until-idle", "--at-once", "2", "--per-user", "2", "--windows", "2", "--max-memory", "4GB"]
    away = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    command = [sys.executable, "-m", "hfquant", *words]  # no fork: this process began the cluster
    with (fleet.desk.folder / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, env=away | {"RAY_ADDRESS": nodes.address}, stdout=log, stderr=log)
    try:
        wait(working, 900)
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        wait(lambda: all(job.is_final for job in fleet.jobs()), 900)
    finally:
        worker.kill()
        worker.wait()
    done = fleet.jobs()
    assert {job.state for job in done} == {"done"}, [job.failure for job in done]
    assert [step.name for step in done[0].steps] == list(REMOTE_STEPS)
    targets = [f"alice/model-{name}" for name in "abc"]
    assert fleet.verdicts() == dict.fromkeys(targets, "up to date")
    assert [fleet.desk.commits(target) for target in targets] == [1, 1, 1]
    assert fleet.sealed() == 0
    for file in Path(nodes.head_node.get_logs_dir_path()).rglob("*"):
        if file.is_file():
            assert TOKENS["alice"].encode() not in file.read_bytes(), file
