"""Conversions as a service: ask for one, look at it, stop it, go on.  The one door for the Space, the CLI and fleets.

Every call names the caller; nobody sees or touches a job of somebody else.  Work is done by `hfquant worker`, in other
processes.  Nothing here loads a model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .facts import Hardware, ModelFacts, Preview
from .job import Event, Job, State, Submitted
from .request import Request
from .settings import Settings


class Service:
    """A service on one database.  Safe to use from several threads; close it, or use it in a `with`."""

    def __init__(self, settings: Settings | None = None) -> None: ...

    def preview(
        self, request: Mapping[str, Any] | Request, *, user: str | None = None, token: str | None = None
    ) -> Preview:
        """What a request would cost and give, and what is not allowed and why.  Asks the Hub; changes nothing.

        user: adds what their limits say.  token: of the caller; without one only public models can be looked at, and
        the target is not checked.  Never raises for a bad request: `problems` tells.
        """
        raise NotImplementedError

    def inspect(self, model: str, *, revision: str = "main", token: str | None = None) -> ModelFacts:
        """A model's facts, from its page and headers.  Raises SourceError with the reason if there are none."""
        raise NotImplementedError

    def hardware(self, token: str | None = None) -> list[Hardware]:
        """What `executor: hf-jobs` can run on, cheapest first."""
        raise NotImplementedError

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
        raise NotImplementedError

    def status(self, job: str, user: str) -> Job:
        """Raises JobError if this user has no such job; so do all calls below."""
        raise NotImplementedError

    def jobs(
        self, user: str, *, states: Sequence[State] = (), limit: int = 50, before: float | None = None
    ) -> list[Job]:
        """This user's jobs, newest first.  before: only those created earlier, for the next page."""
        raise NotImplementedError

    def events(self, job: str, user: str, since: int = 0, limit: int = 1000) -> list[Event]:
        """What happened after the event of that number, oldest first."""
        raise NotImplementedError

    def cancel(self, job: str, user: str) -> Job:
        """Stop a job, within a second where it runs; its token is forgotten, its finished layers are kept for a day."""
        raise NotImplementedError

    def resume(self, job: str, user: str, token: str | None = None, *, expires: float | None = None) -> Job:
        """Go on with a job that was cancelled or failed, where it stopped; in `review`: push the result.

        Raises TokenError if the job needs a token and none is given.
        """
        raise NotImplementedError

    def retry(self, job: str, user: str, token: str | None = None, *, expires: float | None = None) -> Job:
        """Begin a job anew, from nothing; also one that is done."""
        raise NotImplementedError

    def delete(self, job: str, user: str) -> None:
        """Forget a job that is not running: its history, report and files here.  What was pushed stays."""
        raise NotImplementedError

    def report(self, job: str, user: str) -> dict[str, Any] | None:
        """report.json of a job that was measured (as it is published, without paths); None before."""
        raise NotImplementedError

    def card(self, job: str, user: str) -> str | None:
        """The card as it is, or will be, pushed: Markdown, model-supplied text in it is escaped; None before."""
        raise NotImplementedError

    def result(self, job: str, user: str) -> Path | None:
        """The folder of a finished job's checkpoint that was not pushed, if it lies on this machine's disk."""
        raise NotImplementedError

    def close(self) -> None: ...

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
