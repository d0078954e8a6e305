"""Seeing that no job is left lying: work of dead workers, work that DBOS lost, folders that nobody needs."""

import logging

from dbos import DBOS

from .claims import Claim, Claims
from .job import Failure
from .presence import Presence
from .queue import VERSION, Queue
from .workflow import RECOVERIES, Conversions
from .workspace import Workspace

ENDED = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED", "LOST")
LOGGER = logging.getLogger("hfquant.worker")


class Watch:
    """What a worker does for all jobs, its own and others', at every beat."""

    def __init__(self, claims: Claims, queue: Queue, presence: Presence, conversions: Conversions) -> None:
        self._claims, self._queue, self._presence, self._conversions = claims, queue, presence, conversions
        self._suspects: set[tuple[str, int]] = set()

    def look(self) -> None:
        """Dead workers' jobs go back to the queue, what DBOS and the jobs' rows disagree about is settled."""
        living = self._presence.living()
        if lost := self._queue.executors() - living:
            DBOS._recover_pending_workflows(sorted(lost))  # by itself DBOS does so only for its own executor
        self._reconcile(living)
        self._claims.promote()

    def _reconcile(self, living: set[str]) -> None:
        """Compare the jobs that should be under way with what DBOS says of them.

        What does not fit is looked at a second time before anything is done: it may have been about to change.
        """
        rows = self._claims.dispatched()
        states = self._queue.states([(row["id"], row["attempt"]) for row in rows])
        suspects = set()
        for row in rows:
            job, attempt = str(row["id"]), int(row["attempt"])
            status, executor, version = states.get(job, ("LOST", None, None))
            forgotten = status == "PENDING" and executor == self._presence.id and job not in self._conversions.running
            left = version != VERSION and executor not in living
            if status in ENDED or forgotten or left:
                suspects.add((job, attempt))
                if (job, attempt) in self._suspects:
                    LOGGER.warning("job %s is %s at DBOS, %s here", job, status, row["state"])
                    self._settle(Claim(job, attempt, None), status, version)
        self._suspects = suspects

    def _settle(self, claim: Claim, status: str, version: str | None) -> None:
        if status == "MAX_RECOVERY_ATTEMPTS_EXCEEDED":
            why = f"this job took its worker down {RECOVERIES} times"
            self._claims.finish(claim, "failed", Failure("ResourceError", why, "take a smaller model"))
        elif status == "CANCELLED":
            self._claims.finish(claim, "cancelled")
        elif status in ("ERROR", "SUCCESS"):
            why = "the work ended and nobody knows how"
            self._claims.finish(claim, "failed", Failure("Bug", why, "resume the job"))
        elif status == "LOST" or version != VERSION:
            self._claims.move(claim)
        else:
            self._queue.again(claim.job, claim.attempt)


def sweep(claims: Claims, workspace: Workspace) -> None:
    """Remove what nobody needs: folders of jobs that ended, old histories, tokens that were left."""
    kept = claims.clean()
    for job in workspace.sweep(lambda job, hours: hours < kept.get(job, 0.0)):
        LOGGER.info("removed the files of job %s", job)
