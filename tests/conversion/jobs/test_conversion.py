"""A conversion from the Hub to the Hub: what comes out, what is asked on the way, and how it is stopped."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfquant import load
from hfquant.conversion.job import LOCAL_STEPS
from hfquant.conversion.worker import Worker
from hfquant.errors import JobError
from tests.hub.fixtures import TOKENS

from .conftest import RECIPE, Desk, wait, weights

Calm = Callable[[str], dict[str, str]]


def test_from_the_hub_to_the_hub(desk: Desk, calm: Calm) -> None:
    job = desk.submit()
    assert (desk.job(job).state, desk.job(job).place) == ("queued", 1)
    desk.work()
    done = desk.ended(job)
    assert (done.state, done.failure) == ("done", None)
    assert [step.name for step in done.steps] == list(LOCAL_STEPS)
    assert {step.state for step in done.steps} == {"done"}
    assert (done.progress.share, done.progress.layers_done, done.progress.layers) == (1.0, 21, 21)
    # the same bytes as without a service; one commit; verified
    files = desk.arrived("alice/small")
    assert weights(files) == calm("rtn")
    assert desk.commits("alice/small") == 1
    assert done.pushed is not None
    assert done.pushed.commit == desk.hub.store.repos["alice/small"].resolve("main").sha
    origin = json.loads((desk.hub.store.folder / files["hfquant.json"]).read_text())
    assert {file["path"]: file["sha256"] for file in origin["files"]}.items() <= files.items()
    assert (origin["base"]["id"], origin["base"]["revision"]) == ("alice/model", done.revision)
    assert origin["base"]["license"] == "apache-2.0"
    # the card and the report as they are on the Hub, and nothing of this machine in them
    card, report = desk.service.card(job, "alice"), desk.service.report(job, "alice")
    assert card is not None
    assert card.encode() == (desk.hub.store.folder / files["README.md"]).read_bytes()
    assert report == json.loads((desk.hub.store.folder / files["report.json"]).read_text())
    assert str(desk.folder) not in card + json.dumps(report)
    shown = desk.service.figures(job, "alice")
    assert sorted(shown) == ["figures/bits.png", "figures/layer-error.png"]
    for name, content in shown.items():
        assert f"]({name})" in card
        assert content == (desk.hub.store.folder / files[name]).read_bytes()
    with pytest.raises(JobError):
        desk.service.figures(job, "bob")
    # what happened, in order
    events = desk.service.events(job, "alice")
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    begun = [event.data["name"] for event in events if event.kind == "step" and event.data["state"] == "running"]
    assert begun == list(LOCAL_STEPS)
    layers = [event.data for event in events if event.kind == "layer"]
    assert len(layers) == 21
    assert all(layer["error"] > 0 and layer["bytes_after"] < layer["bytes_before"] for layer in layers)
    assert [layer["share"] for layer in layers] == sorted(layer["share"] for layer in layers)
    assert "network: none" in next(event.data["text"] for event in events if event.kind == "log")
    # nothing left
    assert desk.rooms() == []


def test_reviewed_before_it_is_pushed(desk: Desk, calm: Calm) -> None:
    """Held back, looked at, then pushed as a pull request with what was made; the recipe and its text are the job's."""
    desk.hub.store.create("bob/theirs")
    text = "The lion walked down the yellow road, and the girl followed him with her dog. " * 200
    recipe = {"steps": [{"method": "gptq"}], "grid": "w4g32", "calibration": {"samples": 2, "seq_len": 16}} | {
        "gate": RECIPE["gate"]
    }
    wish = {"recipe": recipe, "target": "bob/theirs", "pull_request": True, "review": True, "calibration_text": text}
    job = desk.submit(**wish)
    desk.work()
    held = desk.ended(job)
    assert held.state == "review"
    assert {step.name: step.state for step in held.steps}["push"] == "waiting"
    folder = desk.service.result(job, "alice")
    assert folder is not None
    assert load(folder).config.model_type == "llama"
    assert "4 bit" in str(desk.service.card(job, "alice"))
    assert not desk.hub.store.repos["bob/theirs"].discussions
    assert held.request["calibration_text"] is None, "it is not shown with every look at the job"
    desk.service.resume(job, "alice", TOKENS["alice"])
    done = desk.ended(job)
    assert done.pushed is not None
    assert (done.state, done.pushed.pull_request) == ("done", 1)
    assert desk.commits("bob/theirs") == 0
    assert "model.safetensors" in desk.arrived("bob/theirs", "refs/pr/1")
    report = desk.service.report(job, "alice")
    assert report is not None
    assert report["calibration"]["samples"] == 2


def test_without_a_target_the_result_stays_for_its_owner(desk: Desk) -> None:
    job = desk.submit(target=None)
    desk.work(real=False)
    assert desk.ended(job).state == "done"
    folder = desk.service.result(job, "alice")
    assert folder is not None
    assert {"model.safetensors", "config.json", "README.md"} <= {file.name for file in folder.iterdir()}
    assert not (folder.parent / "source").exists()
    assert [e for e in desk.hub.faults.log if not e.startswith(("GET", "HEAD"))] == []
    desk.service.delete(job, "alice")
    assert desk.rooms() == []


def test_what_is_not_good_enough_is_not_pushed(desk: Desk) -> None:
    job = desk.submit(recipe={**RECIPE, "grid": "w2g32", "gate": {"max_kl": 1e-9}})
    desk.work()
    failed = desk.ended(job)
    assert failed.failure is not None
    assert (failed.failure.kind, "KL divergence is" in failed.failure.message) == ("QualityError", True)
    assert "alice/small" not in desk.hub.store.repos
    assert {step.name: step.state for step in failed.steps}["gate"] == "failed"
    report = desk.service.report(job, "alice")
    assert report is not None
    assert report["evaluation"]["kl"] > 1e-9
    assert str(desk.folder) not in json.dumps(report)


def test_what_comes_from_a_gated_model_is_gated_and_private(desk: Desk) -> None:
    desk.hub.store.repos["alice/model"].gated = "manual"
    desk.hub.store.repos["alice/model"].granted.add("bob")
    job = desk.submit("bob", target="bob/small")
    desk.work(real=False)
    assert desk.ended(job, "bob").state == "done"
    made = desk.hub.store.repos["bob/small"]
    assert (made.private, made.gated) == (True, "manual")


@pytest.mark.parametrize("step", ["download", "compress"])
def test_cancelled_within_a_second_and_resumed(desk: Desk, calm: Calm, step: str) -> None:
    """The child is dead and the token forgotten; what is finished stays for a day, and is gone on with."""

    def slow(worker: Worker) -> None:
        """The download waits in its first file, as from a slow Hub."""
        from hfquant.conversion import pull

        fetch = pull._fetch

        def waiting(seen: Any, name: str, folder: Path, token: Any, guard: Callable[[], None]) -> None:
            until = time.monotonic() + 20
            while step == "download" and time.monotonic() < until:
                guard()
                time.sleep(0.05)
            fetch(seen, name, folder, token, guard)

        pull._fetch = waiting

    job = desk.submit()
    desk.work(slow)
    wait(lambda: desk.job(job).step == step)
    if step == "compress":
        wait(lambda: desk.job(job).progress.layers_done > 0)
    began = time.monotonic()
    assert desk.service.cancel(job, "alice").state == "cancelled"
    lock = desk.settings.folder / "locks" / job
    wait(lambda: free(lock), 5)
    assert (took := time.monotonic() - began) < 1.0, f"{took:.2f} s from the word to the end of its processes"
    assert desk.service.vault.take(job) is None
    assert "alice/small" not in desk.hub.store.repos
    assert desk.rooms() == [job]
    if step == "download":
        return
    desk.service.resume(job, "alice", TOKENS["alice"])
    done = desk.ended(job)
    assert (done.state, done.attempt) == ("done", 2)
    assert weights(desk.arrived("alice/small")) == calm("rtn")
    assert desk.commits("alice/small") == 1


def free(lock: Path) -> bool:
    """Whether no process works on the job any more."""
    import fcntl

    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_old_files_go_when_a_worker_starts(desk: Desk) -> None:
    """Folders of jobs that nobody knows, and of those that ended; what may be resumed stays for a day."""
    jobs = desk.settings.folder / "jobs"
    for name in ("0" * 32, "1" * 32):
        (jobs / name / "out").mkdir(parents=True)
    job = desk.submit()
    desk.service.cancel(job, "alice")
    (jobs / job).mkdir(exist_ok=True)
    desk.work()
    wait(lambda: desk.rooms() == [job])
