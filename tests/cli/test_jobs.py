"""`hfquant jobs` and `hfquant worker`, on a Hub of their own."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import Result

from hfquant.cli import engine_service
from hfquant.conversion import sandbox
from hfquant.errors import RequestError
from tests.conversion.jobs.forks import start
from tests.hub.server import Hub

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def here(hub: Hub, built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose user is alice, at home and on the Hub; children are forks; handlers of signals stay."""
    hub.store.upload("alice/model", built("llama"))
    for name in ("HFQUANT_DATABASE", "HFQUANT_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HFQUANT_FOLDER", str(tmp_path / "service"))
    monkeypatch.setenv("HFQUANT_USER", "alice")
    monkeypatch.setattr(sandbox, "start", start)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


ASK = ("alice/model", "-r", "rtn-w4g32", "--set", "gate.max_ppl_ratio=null", "--push", "alice/small")


def test_from_asking_to_the_hub(run: Run, hub: Hub) -> None:
    job = run("jobs", "submit", *ASK).stdout.strip()
    assert len(job) == 32
    again = run("jobs", "submit", *ASK)
    assert (again.stdout.strip(), "asked for before" in again.stderr) == (job, True)
    listed = run("jobs", "list").stdout.splitlines()
    assert listed[0].split() == ["job", "state", "model", "recipe", "target"]
    assert listed[1].startswith(f"{job[:10]}  queued (1)  alice/model")
    assert "state  cancelled" in run("jobs", "cancel", job[:8]).stdout
    assert "state  queued (1)" in run("jobs", "resume", job[:8]).stdout
    assert run("worker", "--until-idle", "--windows", "2", "--max-memory", "4GB").exit_code == 0
    shown = run("jobs", "show", "alice/small", "--log")
    assert f"{hub.url}/alice/small" in shown.stdout
    assert "attempt  2" in shown.stdout
    assert "layer name=model.layers.0.self_attn.q_proj.weight" in shown.stderr
    found = json.loads(run("jobs", "show", job, "--json").stdout)
    assert (found["state"], found["pushed"]["repo"]) == ("done", "alice/small")
    assert "model.safetensors" in hub.store.repos["alice/small"].resolve("main").files
    refused = run("jobs", "cancel", job)
    assert (refused.exit_code, "this job is done" in refused.stderr) == (2, True)
    run("jobs", "delete", job)
    assert json.loads(run("jobs", "list", "--json").stdout) == []


def test_previews(run: Run) -> None:
    done = run("jobs", "submit", *ASK, "--preview")
    assert done.exit_code == 0
    assert "format    compressed_tensors" in done.stdout
    assert "loads in  hfquant, transformers, vLLM" in done.stdout
    assert run("jobs", "list").stdout.splitlines()[1:] == []
    refused = run("jobs", "submit", "alice/none", "-r", "rtn-w8", "--push", "bob/x", "--preview")
    assert refused.exit_code == 2
    assert "refused: alice/none is not on the Hub, or private" in refused.stderr
    assert "hint: " in refused.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("submit", "alice/model", "-r", "rtm-w8"), "unknown method `rtm`"),
        (("submit", "model", "-r", "rtn-w8"), "should be `namespace/name`"),
        (("submit", "alice/model", "-r", "rtn-w8", "--push", "bob/x"), "may not create it"),
        (("submit", "alice/model", "-r", "rtn-w8", "--max-usd", "3"), "are for `executor: hf-jobs`"),
        (("show", "0123"), "there is no such job"),
        (("cancel", ""), "there is no such job"),
    ],
)
def test_refusals(run: Run, words: tuple[str, ...], said: str) -> None:
    done = run("jobs", *words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "hint: " in done.stderr


def test_other_users_jobs_are_theirs(run: Run) -> None:
    job = run("jobs", "submit", *ASK).stdout.strip()
    assert "no such job" in run("jobs", "show", job, "--user", "bob").stderr
    assert len(run("jobs", "list", "--user", "bob").stdout.splitlines()) == 1


def test_with_a_secret_the_token_travels_sealed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = run("worker", "--new-secret").stdout.strip()
    monkeypatch.setenv("HFQUANT_SECRET", secret)
    job = run("jobs", "submit", *ASK).stdout.strip()
    with engine_service.service() as service:
        kept = service.vault.take(job)
        assert kept is not None
        assert kept.value == "hf_" + "a" * 34
    assert b"aaaaaaaaaa" not in (tmp_path / "service" / "jobs.sqlite").read_bytes()


def test_without_its_packages_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_service, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="needs the package `dbos`") as refused:
        engine_service.service()
    assert refused.value.hint == "`pip install 'hfquant[service]'`"
