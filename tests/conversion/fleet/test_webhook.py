"""Webhooks: only who knows the secret, nothing twice, nothing lost, an answer at once."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from hfquant.conversion.database import Database
from hfquant.conversion.fleet.inbox import PATIENCE, Arrival, Inbox
from hfquant.conversion.fleet.serve import is_own
from hfquant.conversion.fleet.webhook import HEADER, MOST, PATH, Handler, check_secret, read, router
from hfquant.errors import FleetError, SourceError
from tests.conversion.fleet.recorded import manifest

SECRET = "0123456789abcdef0123"
SHA = "a" * 40


def message(
    name: str = "org/one", sha: str | None = SHA, ref: str = "refs/heads/main", **changes: Any
) -> dict[str, Any]:
    return {
        "event": {"action": "update", "scope": "repo.content"},
        "repo": {"type": "model", "name": name, "headSha": sha},
        "updatedRefs": [{"ref": ref, "oldSha": "b" * 40, "newSha": sha}],
        "webhook": {"id": "1", "version": 3},
    } | changes


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path_factory.mktemp('inbox') / 'jobs.sqlite'}")
    made.create()
    yield made
    made.close()


@pytest.fixture
def inbox(database: Database) -> Inbox:
    found = Inbox(database)
    for arrival in found.waiting():
        found.handled(arrival)
    return found


@pytest.fixture
def client(inbox: Inbox) -> TestClient:
    app = FastAPI()
    app.include_router(router(SECRET, inbox, lambda repo: is_own(manifest(), repo), lambda: None))
    return TestClient(app)


def post(client: TestClient, body: Any, secret: Any = SECRET) -> int:
    headers = {} if secret is None else {HEADER: secret}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(PATH, content=content, headers=headers).status_code


@pytest.mark.parametrize("secret", [None, "", "wrong", SECRET + "x", "ä".encode(), b"\xff\xfe"])
def test_wrong_secrets_are_refused(client: TestClient, inbox: Inbox, secret: Any) -> None:
    assert post(client, message(), secret) == 403
    assert not inbox.waiting()


@pytest.mark.parametrize("secret", [None, "", "short"])
def test_without_a_good_secret_nothing_opens(secret: str | None, inbox: Inbox) -> None:
    with pytest.raises(FleetError, match="secret"):
        router(secret, inbox, lambda repo: False, lambda: None)
    with pytest.raises(FleetError):
        check_secret(secret)


def test_replays_are_one(client: TestClient, inbox: Inbox) -> None:
    sha = "1" * 40
    assert [post(client, message(sha=sha)) for _ in range(3)] == [202, 202, 202]
    assert inbox.waiting() == [Arrival("org/one", sha)]


def test_too_much_is_refused_whatever_it_says_of_its_length(client: TestClient, inbox: Inbox) -> None:
    assert post(client, b" " * 300_000) == 413
    chunks = (b" " * 100_000 for _ in range(10))
    assert client.post(PATH, content=chunks, headers={HEADER: SECRET}).status_code == 413  # type: ignore[arg-type]
    assert MOST < 300_000


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"repo": 1}', b"[" * 100_000])
def test_nonsense_is_refused(client: TestClient, body: bytes) -> None:
    assert post(client, body) == 400


@pytest.mark.parametrize(
    "ignored",
    [
        message(ref="refs/pr/1"),
        message(sha=None),
        message(repo={"type": "dataset", "name": "org/one"}),
        message(event={"scope": "discussion", "action": "create"}),
        message(updatedRefs=[]),
        message(name="acme/one-rtn-w8"),  # pushed by ourselves
    ],
)
def test_what_means_nothing_is_ignored(client: TestClient, inbox: Inbox, ignored: dict[str, Any]) -> None:
    assert post(client, ignored) == 202
    assert not inbox.waiting()


def test_hostile_names_are_no_repositories() -> None:
    for name in ("../../etc", "a/b/c", "a b/c", "x", "<script>/y"):
        with pytest.raises(ValueError, match="repository"):
            read(message(name=name))


def test_a_burst_is_answered_and_nothing_is_lost(client: TestClient, inbox: Inbox) -> None:
    shas = [f"{i:040x}" for i in range(200)]
    answers: list[int] = []
    start = time.monotonic()
    threads = [
        threading.Thread(
            target=lambda part: answers.extend(post(client, message(sha=sha)) for sha in part), args=(shas[i::8],)
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [202] * 200
    assert {a.commit for a in inbox.waiting()} == set(shas)
    assert time.monotonic() - start < 60


def test_it_answers_at_once_whatever_the_work_takes(inbox: Inbox) -> None:
    """The Hub gives a receiver ten seconds, and converting takes hours."""
    begun, end = threading.Event(), threading.Event()
    handled: list[str] = []

    def handle(model: str) -> None:
        begun.set()
        end.wait(60)
        handled.append(model)

    handler = Handler(inbox, handle, pause=0.02)
    app = FastAPI()
    app.include_router(router(SECRET, inbox, lambda repo: False, handler.wake))
    client = TestClient(app)
    handler.start()
    try:
        assert post(client, message("org/first", "7" * 40)) == 202
        assert begun.wait(20)
        assert [post(client, message("org/next", f"{i:040x}")) for i in range(1000, 1010)] == [202] * 10
        assert not handled
    finally:
        end.set()
        handler.stop()
    assert handled[0] == "org/first"


def test_secrets_are_compared_in_constant_time(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def compared(given: bytes, known: bytes) -> bool:
        seen.append((given, known))
        return False

    monkeypatch.setattr("hmac.compare_digest", compared)
    assert post(client, message()) == 403, "nothing else lets anybody in"
    assert seen == [(SECRET.encode(), SECRET.encode())]


def test_what_arrived_is_handled_after_a_restart_and_failures_are_tried_again(inbox: Inbox) -> None:
    """What an earlier process kept, this one finds."""
    good, bad = Arrival("org/good", "5" * 40), Arrival("org/bad", "6" * 40)
    assert inbox.put(good)
    assert inbox.put(bad)
    assert not inbox.put(bad)
    seen: list[str] = []

    def handle(model: str) -> None:
        seen.append(model)
        if model == "org/bad":
            raise SourceError("the Hub cannot be reached")

    handler = Handler(inbox, handle, pause=0.02)
    handler.start()
    deadline = time.monotonic() + 20
    while inbox.waiting() and time.monotonic() < deadline:
        time.sleep(0.02)
    handler.stop()
    assert seen.count("org/good") == 1
    assert seen.count("org/bad") == PATIENCE
    assert not inbox.waiting()
