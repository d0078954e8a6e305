"""Where heavy work is done: one small protocol, so that a workflow need not know.

An executor is asked to start a task and gives a handle; with it the task is polled and cancelled, by this worker or by
another that came after it.  Starting the same task again finds the one that runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ...errors import HfquantError, ResourceError
from ..job import Failure
from ..workspace import Room


@dataclass(frozen=True)
class Task:
    """Heavy work of one attempt of a job.  name: `compress` or `evaluate`, `run` where an executor does everything.

    settings: as `tasks.py` wants them, JSON.  key: names the work; the same for the same task begun again.
    token: of the job's owner, only for executors that are `remote`; kept out of `repr`.  known: the handle that an
    earlier start of this attempt gave.
    """

    name: str
    job: str
    key: str
    room: Room
    settings: Mapping[str, Any]
    seconds: float
    hardware: str | None = None
    token: str | None = field(default=None, repr=False)
    known: str | None = None


@dataclass(frozen=True)
class Poll:
    """What a task did since it was last asked.

    events: as `tasks.py` tells them.  result: of a task that is done.  handle: to be used from now on, if it changed.
    """

    state: Literal["running", "done", "failed"]
    events: Sequence[Mapping[str, Any]] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    handle: str | None = None


class Executor(Protocol):
    """remote: whether it fetches, measures and pushes by itself too, with the owner's token.

    interval: seconds between two polls.
    """

    remote: bool
    interval: float

    def start(self, task: Task) -> str:
        """Begin a task, or find it running -> its handle, which is kept.  Raises HfquantError."""
        ...

    def poll(self, task: Task, handle: str) -> Poll:
        """Raises HfquantError for what will not pass."""
        ...

    def cancel(self, task: Task, handle: str) -> None:
        """Stop it, at once where that is possible; no error if it has ended."""
        ...


class TaskFailed(HfquantError):
    """A task's own report of why it ended."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, failure.hint)
        self.failure = failure


def too_slow(seconds: float) -> ResourceError:
    return ResourceError(
        f"the work took longer than {seconds / 60:,.0f} minutes, which is all that a job may take",
        "use a smaller model or a quicker recipe; resumed, the job goes on behind its last finished layer",
    )
