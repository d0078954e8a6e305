"""The child that does the work: what it cannot reach, what it cannot take, and how quickly it is dead."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hfquant.conversion import sandbox, tasks
from hfquant.conversion.executors import Task
from hfquant.conversion.executors.local import Local
from hfquant.conversion.sandbox import Bounds, Child, environment
from hfquant.conversion.settings import Limits
from hfquant.conversion.workspace import Room
from tests.hub.server import Hub

from . import forks
from .conftest import wait

GB = 1_000_000_000
Act = Callable[[Mapping[str, Any]], Any]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Child]]:
    """run(work, bounds, **task) -> a forked child that does `work(task)`."""
    made: list[Child] = []

    def begin(work: Act, bounds: Bounds = Bounds(), **task: Any) -> Child:  # noqa: B008  # it is frozen
        monkeypatch.setitem(tasks.TASKS, "test", lambda given, tell, heard: work(given))
        made.append(Child({"name": "test", **task}, tmp_path / "tmp", bounds, forks.start))
        return made[-1]

    yield begin
    for child in made:
        child.kill()


def end(child: Child) -> tuple[int, dict[str, Any]]:
    """The exit code and the last word."""
    said: list[dict[str, Any]] = []

    def gone() -> bool:
        exited = child.exited() is not None
        said.extend(child.heard(0.05))
        return exited

    wait(gone)
    said.extend(child.heard(0.05))
    code = child.exited()
    assert code is not None
    return code, next((event for event in said if event["event"] in ("done", "failed")), {})


def test_no_network(run: Callable[..., Child], hub: Hub) -> None:
    """Neither by Python nor by anything else: the child has no interface that is up."""

    def work(task: Mapping[str, Any]) -> dict[str, str]:
        found = {}
        for name, act in {
            "connect": lambda: socket.create_connection(("127.0.0.1", task["port"]), timeout=2),
            "look up": lambda: socket.getaddrinfo("huggingface.co", 443),
            "listen": lambda: socket.socket().bind(("127.0.0.1", 0)),
        }.items():
            try:
                act()
                found[name] = "allowed"
            except OSError as error:
                found[name] = type(error).__name__
        found["interfaces"] = Path("/proc/net/route").read_text() if Path("/proc/net/route").exists() else ""
        return found

    code, said = end(run(work, port=hub.port))
    assert code == 0
    assert [said["result"][name] for name in ("connect", "look up", "listen")] == ["PermissionError"] * 3
    assert "lo" not in said["result"]["interfaces"]
    assert not hub.faults.log


def test_no_network_where_the_kernel_does_not_help(
    run: Callable[..., Child], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfquant.conversion import child

    monkeypatch.setattr(child, "_leave_network", lambda: False)
    code, said = end(run(lambda task: socket.create_connection(("127.0.0.1", task["port"])), port=hub.port))
    assert (code, said["kind"]) == (1, "Bug")
    assert not hub.faults.log


def test_nothing_of_the_workers_environment_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "hf_x", "HFQUANT_SECRET": "x", "AWS_SECRET_ACCESS_KEY": "x", "https_proxy": "http://x"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    given = environment(tmp_path)
    assert not secrets.keys() & given.keys()
    assert given["HF_HUB_OFFLINE"] == "1"
    assert {given[name] for name in ("HOME", "TMPDIR")} == {str(tmp_path)}


def takes_memory(_: Mapping[str, Any]) -> None:
    kept = []
    while True:
        kept.append(bytearray(50_000_000))


def takes_time(_: Mapping[str, Any]) -> None:
    while True:
        pass


def writes_much(task: Mapping[str, Any]) -> None:
    with (Path(task["folder"]) / "large").open("wb") as file:
        while True:
            file.write(b"x" * 1_000_000)


@pytest.mark.parametrize(
    ("work", "bounds", "code", "words"),
    [
        (takes_memory, Bounds(memory=1 * GB), 1, "memory was not enough"),
        (writes_much, Bounds(file=5_000_000), 1, "larger than the job may write"),
    ],
)
def test_limits(run: Callable[..., Child], tmp_path: Path, work: Act, bounds: Bounds, code: int, words: str) -> None:
    if bounds.memory:  # on top of what all of the tests before left in this process, which the child is a copy of
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        bounds = replace(bounds, memory=bounds.memory + int(status["VmData"].split()[0]) * 1024)
    found, said = end(run(work, bounds, folder=str(tmp_path)))
    assert found == code
    assert (said["kind"], words in said["message"]) == ("ResourceError", True)
    large = tmp_path / "large"
    assert not large.exists() or large.stat().st_size <= 5_000_000


def test_processor_time(run: Callable[..., Child]) -> None:
    code, said = end(run(takes_time, Bounds(cpu=1)))
    assert (-code in (signal.SIGXCPU, signal.SIGKILL), said) == (True, {})


class PanicException(BaseException):
    """As Rust's panics come to Python: no `Exception`."""


def panics(_: Mapping[str, Any]) -> None:
    raise PanicException("regex too large")


def exits(_: Mapping[str, Any]) -> None:
    raise SystemExit(0)


@pytest.mark.parametrize(("work", "name"), [(panics, "PanicException"), (exits, "SystemExit")])
def test_whatever_happens_in_there_is_a_failure(run: Callable[..., Child], work: Act, name: str) -> None:
    code, said = end(run(work))
    assert (code, said["kind"], said["message"]) == (1, "Bug", f"the work failed: {name}")


def test_a_log_that_comes_later_than_the_end(run: Callable[..., Child], monkeypatch: pytest.MonkeyPatch) -> None:
    """The end comes through one pipe, what it printed before through another, which may be read more slowly."""
    hear = Child._hear

    def slowly(child: Child, line: bytes, speaks: bool) -> None:
        time.sleep(0 if speaks else 0.1)
        hear(child, line, speaks)

    monkeypatch.setattr(Child, "_hear", slowly)
    child, said = run(panics), []
    wait(lambda: said.extend(child.heard(0.05)) or any(event["event"] == "failed" for event in said))
    assert not any("too large" in event.get("text", "") for event in said), "it is slow enough to show something"
    assert any("PanicException: regex too large" in event.get("text", "") for event in child.rest())


def test_a_process_that_holds_the_pipes_open_is_not_waited_for(run: Callable[..., Child]) -> None:
    def work(task: Mapping[str, Any]) -> None:
        if os.fork() == 0:
            time.sleep(60)

    child, said = run(work), []
    wait(lambda: said.extend(child.heard(0.05)) or any(event["event"] == "done" for event in said))
    began = time.monotonic()
    child.rest()
    assert time.monotonic() - began < 3


def test_an_end_that_is_read_slowly_is_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is gone before what it said last is heard."""
    hear = Child._hear

    def slowly(child: Child, line: bytes, speaks: bool) -> None:
        time.sleep(0.4)
        hear(child, line, speaks)

    monkeypatch.setattr(Child, "_hear", slowly)
    monkeypatch.setitem(tasks.TASKS, "test", lambda given, tell, heard: {"made": 1})
    room = Room(tmp_path)
    room.tmp.mkdir(parents=True)
    local = Local(Limits(), 4 * GB, forks.start)
    task = Task(name="test", job="j", key="k", room=room, settings={}, seconds=60)
    handle, seen = local.start(task), []
    wait(lambda: seen.append(local.poll(task, handle)) or seen[-1].state != "running")
    assert (seen[-1].state, seen[-1].result) == ("done", {"made": 1})


def test_killed_within_a_second_with_all_that_it_started(run: Callable[..., Child], tmp_path: Path) -> None:
    """Also what ignores signals, and what hides in a child of its own."""

    def work(task: Mapping[str, Any]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        grandchild = os.fork()
        if grandchild:
            Path(task["file"]).write_text(str(grandchild))
        takes_time(task)

    child = run(work, file=str(tmp_path / "grandchild"))
    grandchild = int(wait(lambda: (tmp_path / "grandchild").is_file() and (tmp_path / "grandchild").read_text()))
    began = time.monotonic()
    child.kill()
    assert time.monotonic() - began < 1
    assert child.exited() == -signal.SIGKILL
    wait(lambda: not alive(grandchild), 1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_dies_with_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "test", lambda given, tell, heard: takes_time(given))

    def worker() -> None:
        made = Child({"name": "test"}, tmp_path / "tmp", Bounds(), forks.start)
        (tmp_path / "pid").write_text(str(made.process.pid))
        time.sleep(60)

    parent = forks.Forked(worker)
    child = int(wait(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()))
    parent.kill()
    parent.wait()
    wait(lambda: not alive(child), 2)


def test_a_child_that_shouts_is_heard_but_cannot_fill_the_memory(run: Callable[..., Child]) -> None:
    def work(_: Mapping[str, Any]) -> None:
        for n in range(20_000):
            os.write(2, b"x" * 200 + str(n).encode() + b"\n")

    child = run(work)
    wait(lambda: child.process.poll() is not None)
    assert child.said.qsize() <= sandbox.LINES


def test_the_real_one(tmp_path: Path) -> None:
    """Python begun anew, as a worker does it: clean command line and environment, no torch before the doors shut."""
    child = Child({"name": "layouts"}, tmp_path / "tmp", Bounds(memory=4 * GB))
    try:
        first = wait(lambda: next(child.heard(1), None))
        assert first["event"] == "started"
        proc = Path(f"/proc/{child.process.pid}")
        assert proc.joinpath("cmdline").read_bytes().split(b"\0")[1:4] == [b"-I", b"-m", b"hfquant.conversion.child"]
        assert b"HF_TOKEN" not in proc.joinpath("environ").read_bytes()
        assert os.getsid(child.process.pid) == child.process.pid
    finally:
        child.kill()
