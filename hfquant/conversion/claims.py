"""Jobs as workers see and change them: each change holds only while the attempt is still this worker's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa

from .database import figures, jobs, tokens
from .job import ACTIVE, FINAL, Failure, Kind, State
from .record import DAY, Record, Row, first

STOPPED_HOURS = 24.0  # that the files of a failed or cancelled job are kept


@dataclass(frozen=True)
class Claim:
    """An attempt that a worker works on.  worker: None for what is decided about it from outside."""

    job: str
    attempt: int
    worker: str | None

    @property
    def holds(self) -> tuple[sa.ColumnElement[bool], ...]:
        """True of the job as long as this is its attempt, and this worker's."""
        mine = jobs.c.id == self.job, jobs.c.attempt == self.attempt
        if self.worker is None:
            return *mine, jobs.c.state.in_(ACTIVE)
        return *mine, jobs.c.state == "running", jobs.c.worker == self.worker


class Claims(Record):
    """For workers, and for what watches over them."""

    def take(self, claim: Claim, place: str) -> Row | None:
        """Declare that this worker works on an attempt; None if that is not wanted any more.

        place: the folder that its files will be in.  Had it begun in another one, a new attempt is queued instead.
        """
        mine = replace(claim, worker=None).holds
        with self.database.write() as connection:
            row = first(connection, sa.select(jobs).where(*mine))
            if row is None:
                return None
            if row["place"] not in (None, place) and row["worker"] is not None:
                self._move(connection, row)
                return None
            now = self.database.now(connection)
            changes = {"state": "running", "worker": claim.worker, "place": place, "started": row["started"] or now}
            connection.execute(jobs.update().where(*mine).values(**changes))
            if row["state"] == "queued":
                self._event(connection, claim.job, "state", {"state": "running"})
            return row | changes

    def move(self, claim: Claim) -> None:
        """Queue anew what DBOS cannot go on with."""
        with self.database.write() as connection:
            if (row := first(connection, sa.select(jobs).where(*claim.holds))) is not None:
                self._move(connection, row)

    def _move(self, connection: sa.Connection, row: Row) -> None:
        """A new attempt for work whose files are out of reach; limits do not count."""
        changes = {"state": "queued", "attempt": row["attempt"] + 1, "dispatched": False, "worker": None, "place": None}
        connection.execute(jobs.update().where(jobs.c.id == row["id"]).values(**changes))
        self._event(connection, row["id"], "state", {"state": "queued", "attempt": row["attempt"] + 1})
        self._promote(connection)

    def wanted(self, claim: Claim) -> bool:
        """Whether this is still to be worked on here: it was not cancelled, nor taken over."""
        with self.database.read() as connection:
            return connection.execute(sa.select(jobs.c.id).where(*claim.holds)).first() is not None

    def note(self, claim: Claim, happened: Sequence[tuple[Kind, Mapping[str, Any]]], **changes: Any) -> None:
        """Write down events of an attempt and what else changed; nothing if it is not wanted any more."""
        with self.database.write() as connection:
            if connection.execute(sa.select(jobs.c.id).where(*claim.holds)).first() is None:
                return
            if changes:
                connection.execute(jobs.update().where(*claim.holds).values(**changes))
            for kind, data in happened:
                self._event(connection, claim.job, kind, data)

    def keep(self, claim: Claim, pictures: Mapping[str, bytes]) -> None:
        """The figures of an attempt's card, by their names, in the place of those before."""
        with self.database.write() as connection:
            if connection.execute(sa.select(jobs.c.id).where(*claim.holds)).first() is None:
                return
            connection.execute(figures.delete().where(figures.c.job == claim.job))
            for name, content in pictures.items():
                connection.execute(figures.insert().values(job=claim.job, name=name, content=content))

    def finish(self, claim: Claim, state: State, failure: Failure | None = None) -> None:
        """The end of an attempt, if it is still wanted; the owner's next job goes to the queue."""
        with self.database.write() as connection:
            ended: Row = {"state": state, "finished": self.database.now(connection), "dispatched": False}
            told = None if failure is None else asdict(failure)
            done = connection.execute(jobs.update().where(*claim.holds).values(**ended, failure=told))
            if done.rowcount:
                self._end(connection, claim.job, state, told)

    def dispatched(self) -> list[Row]:
        """The jobs that DBOS should have."""
        mine = jobs.c.dispatched, jobs.c.state.in_(ACTIVE)
        with self.database.read() as connection:
            found = connection.execute(sa.select(jobs.c.id, jobs.c.attempt, jobs.c.state).where(*mine))
            return [dict(row) for row in found.mappings()]

    def clean(self) -> dict[str, float]:
        """Forget old jobs and the tokens of ended ones -> how many hours the files of each job may lie untouched."""
        with self.database.write() as connection:
            old = self.database.now(connection) - self.limits.keep_days * DAY
            ended = jobs.c.state.in_(FINAL), jobs.c.finished < old
            gone = connection.execute(sa.select(jobs.c.id, jobs.c.attempt).where(*ended)).all()
            connection.execute(jobs.delete().where(*ended))
            live = sa.select(jobs.c.id).where(jobs.c.state.in_(ACTIVE))
            connection.execute(tokens.delete().where(tokens.c.job.not_in(live)))
            known = connection.execute(sa.select(jobs.c.id, jobs.c.state)).all()
        for job, attempts in gone:
            self.queue.forget(job, attempts)
        return {job: STOPPED_HOURS if state in ("failed", "cancelled") else math.inf for job, state in known}
