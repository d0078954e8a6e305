"""One attempt of a job, step by step, each written down by DBOS when it is done.

DBOS runs `convert` again from its start after a crash; steps that are written down are not done a second time.  So
what happens between steps must be the same each time, or harmless twice.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, cast

from dbos import DBOS

from ..errors import HfquantError, ResourceError
from .child import FULL
from .claims import Claim
from .executors import TaskFailed
from .job import LOCAL_STEPS, REMOTE_STEPS, Failure, State, Unwanted
from .queue import WORKFLOW
from .redact import redact
from .steps import Review, Steps, Tools

RECOVERIES = 30  # of one attempt; a job that takes its worker down that often is given up
LOGGER = logging.getLogger("hfquant.worker")


class Conversions:
    """What this worker is at: the jobs, and with what tools."""

    def __init__(self, tools: Tools, worker: str) -> None:
        self.tools, self.worker = tools, worker
        self.running: dict[str, int] = {}
        self._lock = threading.Lock()

    def convert(self, job: str, attempt: int) -> str:
        """An attempt of a job, from where it is -> the state that it ended in."""
        claim = Claim(job, attempt, self.worker)
        row = self.tools.claims.take(claim, self.tools.workspace.id)
        if row is None:
            return "unwanted"
        with self._lock:
            self.running[job] = attempt
        try:
            with self.tools.workspace.locked(job, lambda: self.tools.claims.wanted(claim)):
                return self._steps(Steps(self.tools, row, claim))
        except Unwanted:
            return "unwanted"
        except ResourceError as error:
            self.tools.claims.finish(claim, "failed", explain(error, str))
            return "failed"
        finally:
            with self._lock:
                if self.running.get(job) == attempt:
                    del self.running[job]

    def _steps(self, steps: Steps) -> str:
        remote = self.tools.executors[steps.request.executor].remote
        for name in REMOTE_STEPS if remote else LOCAL_STEPS:
            outcome = DBOS.run_step({"name": name}, self.step, steps.job, steps.attempt, name)
            if outcome["state"] != "done":
                self._end(steps, outcome["state"], outcome.get("failure"))
                return str(outcome["state"])
        self._end(steps, "done", None)
        return "done"

    def step(self, job: str, attempt: int, name: str) -> dict[str, Any]:
        """One step -> {state, value or failure}: an error is an outcome like another, and written down too."""
        row = self.tools.claims.find(job)
        if row is None or row["attempt"] != attempt:
            return {"state": "unwanted"}
        steps, began = Steps(self.tools, row, Claim(job, attempt, self.worker)), time.monotonic()
        self._show(steps, name, "running", None)
        try:
            value = steps.run(name)
        except Unwanted:
            return {"state": "unwanted"}
        except Review:
            self._show(steps, name, "waiting", None)
            return {"state": "review"}
        except Exception as error:
            self._show(steps, name, "failed", time.monotonic() - began)
            failure = explain(error, lambda text: text.replace(str(steps.room.path), "the job's folder"))
            if failure.kind == "Bug":
                LOGGER.error("job %s, step %s:\n%s", job, name, redact(traceback.format_exc()))
            if _is_about_disk(error):
                steps.room.remove()
            return {"state": "failed", "failure": vars(failure)}
        self._show(steps, name, "skipped" if value.get("skipped") else "done", time.monotonic() - began)
        return {"state": "done", "value": value}

    def _show(self, steps: Steps, name: str, state: str, seconds: float | None) -> None:
        """The step as its owner sees it."""
        row = self.tools.claims.find(steps.job)
        if row is not None:
            shown = [[n, state, seconds] if n == name else [n, s, t] for n, s, t in row["steps"]]
            told = {"name": name, "state": state, "seconds": seconds}
            self.tools.claims.note(steps.claim, [("step", told)], steps=shown)

    def _end(self, steps: Steps, state: str, failure: Mapping[str, Any] | None) -> None:
        if state != "unwanted":
            told = None if failure is None else Failure(**failure)
            self.tools.claims.finish(steps.claim, cast(State, state), told)


def explain(error: Exception, public: Callable[[str], str]) -> Failure:
    """An error in the words that its owner will read.  public: takes what is only this machine's out of a text."""
    if isinstance(error, TaskFailed):
        failure = error.failure
        return Failure(failure.kind, redact(public(failure.message)), failure.hint and redact(public(failure.hint)))
    if isinstance(error, HfquantError):
        hint = None if error.hint is None else redact(public(error.hint))
        return Failure(type(error).__name__, redact(public(error.message)), hint)
    if isinstance(error, OSError) and error.errno in FULL:
        return Failure("ResourceError", FULL[error.errno], "resume the job later, or take a smaller model")
    return Failure("Bug", f"this step failed: {type(error).__name__}", "resume the job; if it fails again, report it")


def _is_about_disk(error: Exception) -> bool:
    """Whether the job's files stand in the way of other jobs: then they go at once."""
    if isinstance(error, TaskFailed):
        return error.failure.message in FULL.values()
    return (isinstance(error, OSError) and error.errno in FULL) or "disk" in str(error).partition("\n")[0]


def register(conversions: Conversions) -> None:
    """Tell DBOS what a conversion is, before it is launched."""

    @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=RECOVERIES)
    def convert(job: str, attempt: int) -> str:
        return conversions.convert(job, attempt)
