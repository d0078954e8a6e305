"""The Hub's webhooks: told of a new commit, keep it and answer at once; what it means is found out behind.

A webhook is a hint, the schedule is the truth: what is lost here, the next `fleet apply` finds.
"""

import hmac
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from ...errors import FleetError, HfquantError
from .inbox import Arrival, Inbox

log = logging.getLogger(__name__)
PATH = "/webhooks/hub"
HEADER = "x-webhook-secret"
MOST = 256_000  # bytes of a message
SHORTEST = 16  # characters of a secret
REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
MAIN = "refs/heads/main"


def check_secret(secret: str | None) -> str:
    """Raises FleetError for one that is missing or could be guessed."""
    if not secret:
        raise FleetError("a webhook without a secret is open to everybody", "set HFQUANT_WEBHOOK_SECRET")
    if len(secret) < SHORTEST:
        raise FleetError(
            f"the webhook's secret has {len(secret)} characters", f"at least {SHORTEST}: `openssl rand -hex 32`"
        )
    return secret


def router(secret: str | None, inbox: Inbox, is_own: Callable[[str], bool], wake: Callable[[], object]) -> APIRouter:
    """The route `POST /webhooks/hub`.

    is_own: whether a repository holds results of ours, whose changes mean nothing.  wake: called when something came.
    Raises FleetError without a good secret.
    """
    known = check_secret(secret).encode()
    routes = APIRouter()

    @routes.post(PATH)
    async def receive(request: Request) -> Response:
        given = request.headers.get(HEADER, "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, known):
            return Response("the secret is wrong", 403)
        body = await _body(request)
        if body is None:
            return Response(f"at most {MOST:,} bytes", 413)
        try:
            arrivals = read(json.loads(body))
        except (ValueError, RecursionError):
            return Response("not a message of the Hub", 400)
        new = [arrival for arrival in arrivals if not is_own(arrival.repo) and inbox.put(arrival)]
        if new:
            wake()
        return Response(json.dumps({"kept": len(new)}), 202, media_type="application/json")

    return routes


async def _body(request: Request) -> bytes | None:
    """None if it is too long; no more of it is read than that."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > MOST:
        return None
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST:
            return None
    return body


def read(message: Any) -> list[Arrival]:
    """The commits that a message tells of: of models, on their main branch.  Raises ValueError for what is none.

    Pull requests, discussions, settings and deleted branches tell of none.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("repo"), Mapping):
        raise ValueError("no message of the Hub")
    repo, event = message["repo"], message.get("event") or {}
    if repo.get("type") != "model" or not str(event.get("scope", "")).startswith("repo"):
        return []
    name = str(repo.get("name"))
    if not REPO.fullmatch(name):
        raise ValueError("no repository")
    refs = message.get("updatedRefs") or ()
    commits = [str(ref.get("newSha")) for ref in refs if isinstance(ref, Mapping) and ref.get("ref") == MAIN]
    return [Arrival(name, commit) for commit in commits if COMMIT.fullmatch(commit)]


class Handler:
    """A thread that turns what arrived into conversions.  handle: given a model, asks for what is due of it."""

    def __init__(self, inbox: Inbox, handle: Callable[[str], object], pause: float = 30.0) -> None:
        self._inbox, self._handle, self._pause = inbox, handle, pause
        self._news, self._ending = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._news.set()

    def stop(self) -> None:
        self._ending = True
        self._news.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        while not self._ending:
            self._news.clear()
            for arrival in self._inbox.waiting():
                if self._ending:
                    return
                self._one(arrival)
            self._news.wait(self._pause)

    def _one(self, arrival: Arrival) -> None:
        try:
            self._handle(arrival.repo)
        except HfquantError as error:
            log.warning("%s at %s: %s", arrival.repo, arrival.commit[:7], error.message)
            self._inbox.failed(arrival)
        else:
            self._inbox.handled(arrival)
