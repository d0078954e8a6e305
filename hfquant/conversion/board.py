"""Jobs as their owners see and change them: a job belongs to its owner in each query."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ..errors import JobError, LimitError
from .database import events, figures, jobs
from .facts import Problem
from .job import ACTIVE, Event, State
from .record import DAY, Record, Row, first
from .vault import Token


class Board(Record):
    """For the service, in which people ask for something."""

    # -- asking ------------------------------------------------------------------------------------------------------

    def get(self, job: str, owner: str) -> Row:
        """Raises JobError if there is no such job of this owner, in the same words whether it exists or not."""
        with self.database.read() as connection:
            return self._get(connection, job, owner)

    def _get(self, connection: sa.Connection, job: str, owner: str) -> Row:
        found = first(connection, sa.select(jobs).where(jobs.c.id == job, jobs.c.owner == owner))
        if found is None:
            raise JobError("there is no such job", "`hfquant jobs list` shows yours")
        return found

    def of(self, owner: str, states: Sequence[State], limit: int, before: float | None) -> list[Row]:
        wanted = sa.select(jobs).where(jobs.c.owner == owner).order_by(jobs.c.created.desc()).limit(limit)
        if states:
            wanted = wanted.where(jobs.c.state.in_(states))
        if before is not None:
            wanted = wanted.where(jobs.c.created < before)
        with self.database.read() as connection:
            return [dict(found) for found in connection.execute(wanted).mappings()]

    def place(self, row: Row) -> int | None:
        """How many jobs go before a waiting one, and itself."""
        if row["state"] != "queued":
            return None
        earlier = sa.or_(
            jobs.c.priority < row["priority"],
            sa.and_(jobs.c.priority == row["priority"], jobs.c.queued < row["queued"]),
        )
        with self.database.read() as connection:
            count = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state == "queued", earlier)
            return 1 + int(connection.execute(count).scalar_one())

    def places(self) -> dict[str, int]:
        """The same for all waiting jobs together."""
        waiting = sa.select(jobs.c.id).where(jobs.c.state == "queued").order_by(jobs.c.priority, jobs.c.queued)
        with self.database.read() as connection:
            return {job: at for at, job in enumerate(connection.execute(waiting).scalars(), 1)}

    def events(self, job: str, owner: str, since: int, limit: int) -> list[Event]:
        mine = sa.select(events).join(jobs, jobs.c.id == events.c.job).where(jobs.c.id == job, jobs.c.owner == owner)
        wanted = mine.where(events.c.number > since).order_by(events.c.number).limit(limit)
        with self.database.read() as connection:
            self._get(connection, job, owner)
            found = connection.execute(wanted).mappings()
            return [Event(e["number"], e["time"], e["kind"], e["data"]) for e in found]

    def figures(self, job: str, owner: str) -> dict[str, bytes]:
        with self.database.read() as connection:
            self._get(connection, job, owner)
            found = connection.execute(sa.select(figures.c.name, figures.c.content).where(figures.c.job == job))
            return {name: bytes(content) for name, content in found}

    # -- beginning ---------------------------------------------------------------------------------------------------

    def submit(
        self, owner: str, key: str, content: Mapping[str, Any], token: Token | None, steps: Sequence[str]
    ) -> tuple[str, bool]:
        """The job of this owner with this key: a new one, or the one that is there -> (its id, whether it is new).

        One that failed or was cancelled begins again.  Raises LimitError.
        """
        with self.database.write() as connection:
            found = first(connection, sa.select(jobs).where(jobs.c.owner == owner, jobs.c.key == key))
            if found is not None:
                if found["state"] in ("failed", "cancelled"):
                    self._check_limits(connection, owner)
                    changed = dict(content) | {"steps": [[name, "waiting", None] for name in steps]}
                    connection.execute(jobs.update().where(jobs.c.id == found["id"]).values(**changed))
                    self._begin_again(connection, found | changed, token, fresh=False)
                return str(found["id"]), False
            self._check_limits(connection, owner)
            now = self.database.now(connection)
            made: Row = {
                "id": secrets.token_hex(16), "owner": owner, "key": key, "state": "queued", "attempt": 1,
                "fresh": False, "created": now, "queued": now, "dispatched": False, "events": 0,
                "steps": [[name, "waiting", None] for name in steps], "progress": {},
            }  # fmt: skip
            connection.execute(jobs.insert().values(**made, **content))
            if token is not None:
                self.vault.put(connection, made["id"], token)
            self._event(connection, made["id"], "state", {"state": "queued"})
            self._promote(connection)
            return str(made["id"]), True

    def hindrances(self, owner: str) -> list[Problem]:
        """Why this owner could begin no job now, if so."""
        try:
            with self.database.read() as connection:
                self._check_limits(connection, owner)
        except LimitError as error:
            return [Problem("limit", error.message, error.hint)]
        return []

    def _check_limits(self, connection: sa.Connection, owner: str) -> None:
        waiting = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.state.in_(ACTIVE))
        allowed = self.limits.running_per_user + self.limits.queued_per_user
        mine = int(connection.execute(waiting.where(jobs.c.owner == owner)).scalar_one())
        if mine >= allowed:
            raise LimitError(
                f"{mine} of your jobs are running or waiting, {allowed} may", "wait for one, or cancel one"
            )
        yesterday = self.database.now(connection) - DAY
        recent = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.owner == owner, jobs.c.queued > yesterday)
        if int(connection.execute(recent).scalar_one()) >= self.limits.jobs_per_day:
            raise LimitError(
                f"you began {self.limits.jobs_per_day} jobs in 24 hours, more may not be", "come back later"
            )
        if int(connection.execute(waiting.where(jobs.c.state == "queued")).scalar_one()) >= self.limits.queued:
            raise LimitError(f"the queue is full: {self.limits.queued} jobs are waiting", "try again later")

    def begin_again(self, job: str, owner: str, token: Token | None, *, fresh: bool, states: Sequence[State]) -> None:
        """Another attempt.  Raises JobError unless the job is in one of these states, LimitError."""
        with self.database.write() as connection:
            row = self._get(connection, job, owner)
            if row["state"] not in states:
                raise JobError(f"this job is {row['state']}", f"this is for jobs that are {' or '.join(states)}")
            self._check_limits(connection, owner)
            self._begin_again(connection, row, token, fresh=fresh)

    def _begin_again(self, connection: sa.Connection, row: Row, token: Token | None, *, fresh: bool) -> None:
        now = self.database.now(connection)
        changes: dict[str, Any] = {
            "state": "queued", "attempt": row["attempt"] + 1, "fresh": fresh, "queued": now, "started": None,
            "finished": None, "dispatched": False, "worker": None, "handle": None, "failure": None, "progress": {},
            "steps": [[name, "waiting", None] for name, *_ in row["steps"]], "pushed": None,
            "released": not row["request"]["review"] or row["state"] == "review" or (row["released"] and not fresh),
        }  # fmt: skip
        if fresh:
            changes |= {"report": None, "card": None}
            connection.execute(figures.delete().where(figures.c.job == row["id"]))
        connection.execute(jobs.update().where(jobs.c.id == row["id"]).values(**changes))
        if token is not None:
            self.vault.put(connection, row["id"], token)
        self._event(connection, row["id"], "state", {"state": "queued", "attempt": row["attempt"] + 1})
        self._promote(connection)

    # -- ending ------------------------------------------------------------------------------------------------------

    def cancel(self, job: str, owner: str) -> None:
        """Raises JobError for a job that has ended."""
        with self.database.write() as connection:
            row = self._get(connection, job, owner)
            if row["state"] not in (*ACTIVE, "review"):
                raise JobError(f"this job is {row['state']}", "only jobs that run or wait can be cancelled")
            ended = {"state": "cancelled", "finished": self.database.now(connection), "dispatched": False}
            connection.execute(jobs.update().where(jobs.c.id == job).values(**ended))
            self._end(connection, job, "cancelled", None)
        if row["dispatched"]:
            self.queue.cancel(job, row["attempt"])

    def published(self, job: str, owner: str) -> None:
        """What a job pushed is public now; it is written down who wanted it."""
        with self.database.write() as connection:
            row = self._get(connection, job, owner)
            if row["pushed"] is None:  # begun anew meanwhile
                return
            pushed = row["pushed"] | {"private": False}
            connection.execute(jobs.update().where(jobs.c.id == job).values(pushed=pushed))
            told = {"repo": pushed["repo"], "user": owner, "text": f"{pushed['repo']} was made public by {owner}"}
            self._event(connection, job, "publish", told)

    def delete(self, job: str, owner: str) -> Row:
        """Raises JobError for a job that has not ended."""
        with self.database.write() as connection:
            row = self._get(connection, job, owner)
            if row["state"] in ACTIVE:
                raise JobError(f"this job is {row['state']}", "cancel it first")
            connection.execute(jobs.delete().where(jobs.c.id == job))
        self.queue.forget(job, row["attempt"])
        return row
