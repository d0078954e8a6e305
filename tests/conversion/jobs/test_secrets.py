"""A token goes to the Hub and nowhere else: a canary is looked for in everything that a job leaves or shows."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from hfquant.conversion.database import Database, tokens
from hfquant.conversion.redact import Redact, redact
from hfquant.conversion.service import Service
from hfquant.conversion.settings import Settings
from hfquant.conversion.vault import Memory, Sealed, Token, new_secret
from hfquant.conversion.worker import Worker
from hfquant.errors import RequestError, TokenError

from .conftest import Desk, log
from .forks import start

CANARY = "hf_" + "CanaryCanary" * 3


def holders(folder: Path, words: bytes) -> list[str]:
    """The files that hold these words."""
    found = []
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # files come and go
                if words in Path(path, name).read_bytes():
                    found.append(name)
    return found


def processes(words: bytes) -> Iterator[str]:
    """The processes in whose command line or environment these words stand, as far as they can be read."""
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                if words in (process / name).read_bytes():
                    yield f"{process.name}/{name}"
            except OSError:
                continue


def test_the_canary_is_found_nowhere(desk: Desk) -> None:
    """Looked for all the while: in the database, its journal, the jobs' folders, the log, and every process."""
    desk.hub.store.tokens[CANARY] = "alice"
    words = CANARY.encode()[:20]
    found: set[str] = set()

    def prepare(worker: Worker) -> None:
        run = worker.conversions.step

        def shouting(job: str, attempt: int, name: str) -> dict[str, object]:
            logging.getLogger("hfquant.worker").warning("about to use %s for %s", CANARY, name)
            return run(job, attempt, name)

        worker.conversions.step = shouting  # type: ignore[method-assign]

    job = desk.service.submit(desk.request(), "alice", CANARY).id
    desk.work(prepare)
    until = time.monotonic() + 120
    while not desk.job(job).is_final:
        assert time.monotonic() < until, log(desk)
        found |= {*holders(desk.settings.folder, words), *processes(words)}
        time.sleep(0.2)
    done = desk.ended(job)
    assert done.state == "done"
    assert CANARY in desk.hub.seen_tokens, "it was used"
    found |= {*holders(desk.settings.folder, words), *processes(words)}
    assert found == set()
    assert "about to use hf_… for push" in log(desk)
    assert words not in (desk.folder / "worker.log").read_bytes()
    shown = [desk.service.card(job, "alice"), desk.service.report(job, "alice"), repr(done)]
    shown += [repr(event) for event in desk.service.events(job, "alice")]
    assert CANARY[:20] not in json.dumps(shown, default=str)
    for sha256 in desk.arrived("alice/small").values():
        assert words not in (desk.hub.store.folder / sha256).read_bytes()
    with desk.service._database.read() as connection:
        assert connection.execute(sa.select(tokens)).all() == []


def test_a_token_that_expires_leaves_the_result_waiting(desk: Desk) -> None:
    """The push needs one that is good for a while: log in again, and it is pushed without being made again."""

    def prepare(worker: Worker) -> None:
        run = worker.conversions.step

        def aging(job: str, attempt: int, name: str) -> dict[str, object]:
            if name == "push" and attempt == 1:
                with worker.database.write() as connection:
                    connection.execute(tokens.update().values(expires=time.time() + 30))
            return run(job, attempt, name)

        worker.conversions.step = aging  # type: ignore[method-assign]

    job = desk.submit()
    desk.work(prepare, real=False)
    failed = desk.ended(job)
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.hint) == (
        "TokenError", "log in again, then resume the job: what is finished is kept",
    )  # fmt: skip
    assert desk.service.card(job, "alice"), "it can be looked at"
    desk.service.resume(job, "alice", "hf_" + "a" * 34, expires=time.time() + 3600)
    done = desk.ended(job)
    assert done.state == "done"
    steps = {step.name: step.state for step in done.steps}
    assert (steps["compress"], steps["evaluate"], steps["push"]) == ("skipped", "skipped", "done")


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    made = Database(settings.database)
    made.create()
    yield made
    made.close()


def test_sealed_tokens(database: Database, settings: Settings) -> None:
    assert settings.secret is not None
    vault, job = Sealed(database, settings.secret), "1" * 32
    with database.write() as connection:
        connection.exec_driver_sql(ROW.format(job))
        connection.exec_driver_sql(ROW.format("2" * 32))
        vault.put(connection, job, Token("hf_one", None))
        vault.put(connection, job, Token("hf_two", 5.0))
    assert vault.take(job) == Token("hf_two", 5.0)
    assert vault.take("2" * 32) is None
    with pytest.raises(TokenError, match="sealed with another key"):
        Sealed(database, new_secret()).take(job)
    with database.write() as connection:  # somebody who can write to the database, and has no key
        sealed = connection.execute(sa.select(tokens.c.sealed)).scalar_one()
        assert "hf_two" not in sealed
        connection.execute(tokens.insert().values(job="2" * 32, sealed=sealed))
    with pytest.raises(TokenError, match="belongs to another"):
        vault.take("2" * 32)
    with database.write() as connection:
        vault.forget(connection, job)
    assert vault.take(job) is None
    with pytest.raises(RequestError, match="not a key"):
        Sealed(database, "short")


ROW = (
    "INSERT INTO hfquant_jobs (id, owner, key, state, request, revision, attempt, fresh, released, own_login,"
    " with_token, priority, created, queued, dispatched, steps, progress, events)"
    " VALUES ('{0}', 'a', '{0}', 'queued', '{{}}', '', 1, 0, 0, 0, 1, 1, 0, 0, 0, '[]', '{{}}', 0)"
)


def test_without_a_secret_a_token_never_leaves_the_process(settings: Settings, hub: object) -> None:
    with Service(replace(settings, secret=None), begin=start) as service:
        assert isinstance(service.vault, Memory)
        wish = {"model": "alice/model", "revision": "0" * 40, "recipe": "rtn-w8", "target": "alice/r"}
        job = service.submit(wish, "alice", "hf_" + "a" * 34).id
        assert service.vault.take(job) == Token("hf_" + "a" * 34, None)
        assert holders(settings.folder, b"aaaaaaaaaaaaaaaa") == []
        service.cancel(job, "alice")
        assert service.vault.take(job) is None


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"Bearer {CANARY}", "Bearer …"),
        (f"url?token={CANARY}&x=1", "url?token=hf_…&x=1"),
        ("hf_oauth_eyJhbGciOi.abc-def_ghi.jkl is it", "hf_… is it"),
        ("eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0a.c2lnbmF0dXJl", "eyJ…"),
        ("authorization: bearer AbCdEf123456", "authorization: bearer …"),
        ("hf_home, hf_xet and hf_hub_download stay", "hf_home, hf_xet and hf_hub_download stay"),
        ("model.layers.0 error 0.03", "model.layers.0 error 0.03"),
    ],
)
def test_redaction(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_logs_are_redacted_with_their_arguments_and_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("test.redaction")
    with caplog.at_level(logging.INFO):
        try:
            raise ValueError(CANARY)
        except ValueError:
            logger.exception("failed with %s", CANARY)
        logger.info("%d of %d", 1, 2)
    handler = logging.Formatter()
    for record in caplog.records:
        Redact().filter(record)
    said = "\n".join(handler.format(record) for record in caplog.records)
    assert CANARY not in said
    assert "ValueError: hf_…" in said
    assert "1 of 2" in said


def test_workers_of_a_machine_do_not_lend_their_own_login(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job without a token is nobody's on the Hub, although the worker's machine is logged in."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    desk.hub.store.tokens[CANARY] = "alice"
    desk.hub.store.repos["alice/model"].private = True
    commit = desk.hub.store.repos["alice/model"].resolve("main").sha
    wish = {"model": "alice/model", "revision": commit, "recipe": "rtn-w8"}
    job = desk.service.submit(wish, "bob").id

    def keep_login(worker: Worker) -> None:
        os.environ["HF_TOKEN"] = CANARY

    desk.work(keep_login)
    failed = desk.ended(job, "bob")
    assert failed.failure is not None
    assert "not on the Hub, or private" in failed.failure.message
    assert CANARY not in desk.hub.seen_tokens
