"""Conversions as a service: ask for one, look at it, stop it, go on.  The one door for the Space, the CLI and fleets.

Every call names the caller; nobody sees or touches a job of somebody else.  Work is done by `hfquant worker`, in other
processes.  Nothing here loads a model.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..errors import JobError, RequestError, TokenError
from ..model.hub import understood
from ..model.remote import look
from . import checks
from .board import Board
from .database import Database
from .executors.hf_jobs import hardware
from .facts import Hardware, ModelFacts, Preview
from .job import LOCAL_STEPS, REMOTE_STEPS, Event, Failure, Job, Progress, Pushed, State, Step, Submitted
from .planner import Planner
from .preview import Previewer
from .publish import publish
from .queue import Queue
from .record import Row
from .request import COMMIT, Request, key
from .retry import insisting
from .sandbox import Start
from .settings import Settings
from .slices import Piece
from .vault import EXPIRED, Token, Vault, vault_for
from .workspace import Workspace

SOON = 300.0  # seconds that a token must still be good for when a job is asked for


class Service:
    """A service on one database.  Safe to use from several threads; close it, or use it in a `with`.

    vault: shared with a worker in this process, where settings have no secret.  begin: how children are begun.
    """

    def __init__(
        self, settings: Settings | None = None, *, vault: Vault | None = None, begin: Start | None = None
    ) -> None:
        self.settings = settings or Settings.read()
        self._database = Database(self.settings.database)
        self._database.create()
        self._queue = Queue(self._database)
        self.vault = vault or vault_for(self.settings.secret, self._database)
        self._board = Board(self._database, self._queue, self.vault, self.settings.limits)
        self._planner = Planner(begin)
        self._preview = Previewer(self.settings, self._planner)

    # -- before --------------------------------------------------------------------------------------------------------

    def preview(
        self, request: Mapping[str, Any] | Request, *, user: str | None = None, token: str | None = None
    ) -> Preview:
        """What a request would cost and give, and what is not allowed and why.  Asks the Hub; changes nothing.

        user: adds what their limits say.  token: of the caller; without one only public models can be looked at, and
        the target is not checked.  Never raises for a bad request: `problems` tells.
        """
        limits = () if user is None else self._board.hindrances(user)
        found = self._preview(request, self._as(token))
        return found.with_problems(limits)

    def warm(self) -> None:
        """Make ready for previews: the first one else waits for a process to begin."""
        self._planner.warm()

    def inspect(self, model: str, *, revision: str = "main", token: str | None = None) -> ModelFacts:
        """A model's facts, from its page and headers.  Raises SourceError with the reason if there are none."""
        wish = Request.parse({"model": model, "revision": revision, "recipe": "rtn-w8"})
        return self._preview.inspect(wish.model, wish.revision, self._as(token))

    def block(self, request: Mapping[str, Any] | Request, token: str | None = None) -> list[Piece]:
        """The weights of one block of a model, and the grids of a recipe, for `slices.rounded`; nothing is begun.

        Raises HfquantError with what stands in the way.
        """
        return self._preview.block(request, self._as(token))

    def hardware(self, token: str | None = None) -> list[Hardware]:
        """What `executor: hf-jobs` can run on, cheapest first."""
        return hardware(self._as(token))

    def submit(
        self,
        request: Mapping[str, Any] | Request,
        user: str,
        token: str | None = None,
        *,
        expires: float | None = None,
    ) -> Submitted:
        """Ask for a conversion.  An equal request of the same user is the same job, begun again if it had stopped.

        token: of the Hub, of this user; kept sealed, for this job only, until it ends.  expires: when the token does,
        in seconds since 1970.

        Raises RequestError, RecipeError, SourceError, HubError or TokenError for what could never succeed, LimitError
        for what has to wait.
        """
        wish = Request.parse(request)
        recipe = wish.chosen()
        if not user:
            raise RequestError("a job needs an owner", "log in first")
        if token is None and not self.settings.own_login and wish.target is not None:
            raise TokenError("pushing to the Hub needs a token", "log in first")
        kept = self._kept(token, expires)
        revision = self._revision(wish, token)
        checks.target(wish, self._as(token))
        asked = wish.model_dump(mode="json") | {"recipe": recipe.model_dump(mode="json"), "changes": []}
        content = {
            "request": asked | {"calibration_text": None},
            "text": wish.calibration_text,
            "revision": revision,
            "released": not wish.review,
            "own_login": token is None and self.settings.own_login,
            "with_token": token is not None,
            "priority": wish.priority,
        }
        steps = LOCAL_STEPS if wish.executor == "local" else REMOTE_STEPS
        job, created = self._board.submit(user, key(wish, revision), content, kept, steps)
        return Submitted(job, created)

    def _revision(self, wish: Request, token: str | None) -> str:
        """The original's commit, fixed now: the job converts what its owner saw."""
        if COMMIT.fullmatch(wish.revision):
            return wish.revision
        with understood(wish.model, wish.revision):
            return insisting(lambda: look(wish.model, wish.revision, self._as(token))).commit

    def _as(self, token: str | None) -> str | bool | None:
        """Whom the Hub takes this for: the token's owner; nobody without one, unless the machine's login is meant."""
        return token if token is not None else (None if self.settings.own_login else False)

    def _kept(self, token: str | None, expires: float | None) -> Token | None:
        if token is None:
            return None
        if expires is not None and expires < self._board.now() + SOON:
            raise TokenError("your login at the Hub has expired, or is about to", "log in again")
        return Token(token, expires)

    # -- looking -------------------------------------------------------------------------------------------------------

    def status(self, job: str, user: str) -> Job:
        """Raises JobError if this user has no such job; so do all calls below."""
        row = self._board.get(job, user)
        return self._shown(row, self._board.place(row))

    def jobs(
        self, user: str, *, states: Sequence[State] = (), limit: int = 50, before: float | None = None
    ) -> list[Job]:
        """This user's jobs, newest first.  before: only those created earlier, for the next page."""
        rows, places = self._board.of(user, states, limit, before), self._board.places()
        return [self._shown(row, places.get(row["id"])) for row in rows]

    def events(self, job: str, user: str, since: int = 0, limit: int = 1000) -> list[Event]:
        """What happened after the event of that number, oldest first."""
        return self._board.events(job, user, since, limit)

    def report(self, job: str, user: str) -> dict[str, Any] | None:
        """report.json of a job that was measured (as it is published, without paths); None before."""
        text = self._board.get(job, user)["report"]
        return None if text is None else dict(json.loads(text))

    def card(self, job: str, user: str) -> str | None:
        """The card as it is, or will be, pushed: Markdown, model-supplied text in it is escaped; None before."""
        text = self._board.get(job, user)["card"]
        return None if text is None else str(text)

    def figures(self, job: str, user: str) -> dict[str, bytes]:
        """The pictures of the card, PNG, by the names that they have in it."""
        return self._board.figures(job, user)

    def result(self, job: str, user: str) -> Path | None:
        """The folder of a finished job's checkpoint that was not pushed, if it lies on this machine's disk."""
        row = self._board.get(job, user)
        out = Workspace(self.settings.folder).room(row["id"]).out
        return out if row["state"] in ("done", "review") and out.is_dir() else None

    # -- changing ------------------------------------------------------------------------------------------------------

    def cancel(self, job: str, user: str) -> Job:
        """Stop a job, within a second where it runs; its token is forgotten, its finished layers are kept for a day."""
        self._board.cancel(job, user)
        return self.status(job, user)

    def resume(self, job: str, user: str, token: str | None = None, *, expires: float | None = None) -> Job:
        """Go on with a job that was cancelled or failed, where it stopped; in `review`: push the result.

        Raises TokenError if the job needs a token and none is given.
        """
        return self._again(job, user, token, expires, fresh=False, states=("failed", "cancelled", "review"))

    def retry(self, job: str, user: str, token: str | None = None, *, expires: float | None = None) -> Job:
        """Begin a job anew, from nothing; also one that is done."""
        return self._again(job, user, token, expires, fresh=True, states=("failed", "cancelled", "review", "done"))

    def _again(
        self, job: str, user: str, token: str | None, expires: float | None, *, fresh: bool, states: Sequence[State]
    ) -> Job:
        row = self._board.get(job, user)
        if token is None and row["with_token"]:
            raise TokenError("the token of this job was forgotten when it stopped", EXPIRED)
        self._board.begin_again(job, user, self._kept(token, expires), fresh=fresh, states=states)
        return self.status(job, user)

    def publish(self, job: str, user: str, token: str | None = None) -> Job:
        """Let everybody see the private repository that a finished job pushed, by the word of its owner at the Hub.

        Raises JobError for a job without such a repository, TokenError without a token, HubError where it may not be.
        """
        row = self._board.get(job, user)
        pushed = row["pushed"] or {}
        if row["state"] != "done" or not pushed.get("private") or pushed["pull_request"]:
            raise JobError("this job has no private repository", "this is for what a finished job pushed privately")
        if token is None and not self.settings.own_login:
            raise TokenError("changing a repository of the Hub needs a token", "log in first")
        publish(pushed["repo"], pushed["commit"], self._as(token))
        self._board.published(job, user)
        return self.status(job, user)

    def delete(self, job: str, user: str) -> None:
        """Forget a job that is not running: its history, report and files here.  What was pushed stays."""
        row = self._board.delete(job, user)
        Workspace(self.settings.folder).room(row["id"]).remove()

    def close(self) -> None:
        self._planner.close()
        self._queue.close()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shown(self, row: Row, place: int | None) -> Job:
        told = {name: row["progress"][name] for name in Progress.__dataclass_fields__ if name in row["progress"]}
        return Job(
            id=row["id"],
            user=row["owner"],
            state=row["state"],
            request=row["request"],
            key=row["key"],
            revision=row["revision"],
            attempt=row["attempt"],
            created=row["created"],
            started=row["started"],
            finished=row["finished"],
            steps=tuple(Step(name, state, seconds) for name, state, seconds in row["steps"]),
            progress=Progress(**told),
            place=place if row["state"] == "queued" else None,
            failure=Failure(**row["failure"]) if row["failure"] else None,
            pushed=Pushed(**row["pushed"]) if row["pushed"] else None,
            has_report=row["report"] is not None,
        )
