"""What is known of all jobs, and every change of a job's state.  A job belongs to its owner in each query."""

import json
import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa

from ..errors import JobError, LimitError
from .database import Database, events, jobs, tokens
from .facts import Problem
from .job import ACTIVE, FINAL, Event, Failure, Kind, State
from .queue import Queue
from .redact import redact
from .settings import Limits
from .vault import Token, Vault

Row = dict[str, Any]
DAY = 86400.0
STOPPED_HOURS = 24.0  # that the files of a failed or cancelled job are kept
MAX_EVENTS = 20_000  # of one job; logs end there, the rest goes on
MAX_LOG = 2_000  # characters of one line


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


class Board:
    """Jobs in the database, with the queue behind them."""

    def __init__(self, database: Database, queue: Queue, vault: Vault, limits: Limits) -> None:
        self.database, self.queue, self.vault, self.limits = database, queue, vault, limits

    # -- asking ------------------------------------------------------------------------------------------------------

    def find(self, job: str) -> Row | None:
        """A job, whoever's: for workers."""
        with self.database.read() as connection:
            return _first(connection, sa.select(jobs).where(jobs.c.id == job))

    def get(self, job: str, owner: str) -> Row:
        """Raises JobError if there is no such job of this owner, in the same words whether it exists or not."""
        with self.database.read() as connection:
            return self._get(connection, job, owner)

    def _get(self, connection: sa.Connection, job: str, owner: str) -> Row:
        found = _first(connection, sa.select(jobs).where(jobs.c.id == job, jobs.c.owner == owner))
        if found is None:
            raise JobError("there is no such job", "`hfquant jobs list` shows yours")
        return found

    def now(self) -> float:
        """Seconds since 1970 by the database's clock."""
        with self.database.read() as connection:
            return self.database.now(connection)

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

    def events(self, job: str, owner: str, since: int, limit: int) -> list[Event]:
        mine = sa.select(events).join(jobs, jobs.c.id == events.c.job).where(jobs.c.id == job, jobs.c.owner == owner)
        wanted = mine.where(events.c.number > since).order_by(events.c.number).limit(limit)
        with self.database.read() as connection:
            self._get(connection, job, owner)
            found = connection.execute(wanted).mappings()
            return [Event(e["number"], e["time"], e["kind"], e["data"]) for e in found]

    # -- beginning ---------------------------------------------------------------------------------------------------

    def submit(
        self, owner: str, key: str, content: Mapping[str, Any], token: Token | None, steps: Sequence[str]
    ) -> tuple[str, bool]:
        """The job of this owner with this key: a new one, or the one that is there -> (its id, whether it is new).

        One that failed or was cancelled begins again.  Raises LimitError.
        """
        with self.database.write() as connection:
            found = _first(connection, sa.select(jobs).where(jobs.c.owner == owner, jobs.c.key == key))
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
        connection.execute(jobs.update().where(jobs.c.id == row["id"]).values(**changes))
        if token is not None:
            self.vault.put(connection, row["id"], token)
        self._event(connection, row["id"], "state", {"state": "queued", "attempt": row["attempt"] + 1})
        self._promote(connection)

    # -- planning ----------------------------------------------------------------------------------------------------

    def promote(self) -> None:
        """Hand waiting jobs to the queue, most urgent first, no more of anyone's than may run."""
        with self.database.write() as connection:
            self._promote(connection)

    def _promote(self, connection: sa.Connection) -> None:
        given = sa.select(jobs.c.owner).where(jobs.c.dispatched, jobs.c.state.in_(ACTIVE))
        busy = Counter(connection.execute(given).scalars())
        waiting = sa.select(jobs.c.id, jobs.c.owner, jobs.c.attempt, jobs.c.priority)
        waiting = waiting.where(jobs.c.state == "queued", ~jobs.c.dispatched).order_by(jobs.c.priority, jobs.c.queued)
        for job, owner, attempt, priority in connection.execute(waiting).all():
            if busy[owner] < self.limits.running_per_user:
                busy[owner] += 1
                connection.execute(jobs.update().where(jobs.c.id == job).values(dispatched=True))
                self.queue.put(connection, job, attempt, priority)

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

    # -- working -----------------------------------------------------------------------------------------------------

    def take(self, claim: Claim, place: str) -> Row | None:
        """Declare that this worker works on an attempt; None if that is not wanted any more.

        place: the folder that its files will be in.  Had it begun in another one, a new attempt is queued instead.
        """
        mine = replace(claim, worker=None).holds
        with self.database.write() as connection:
            row = _first(connection, sa.select(jobs).where(*mine))
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
            if (row := _first(connection, sa.select(jobs).where(*claim.holds))) is not None:
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

    def finish(self, claim: Claim, state: State, failure: Failure | None = None) -> None:
        """The end of an attempt, if it is still wanted; the owner's next job goes to the queue."""
        with self.database.write() as connection:
            ended: Row = {"state": state, "finished": self.database.now(connection), "dispatched": False}
            told = None if failure is None else asdict(failure)
            done = connection.execute(jobs.update().where(*claim.holds).values(**ended, failure=told))
            if done.rowcount:
                self._end(connection, claim.job, state, told)

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

    def _end(self, connection: sa.Connection, job: str, state: State, failure: Mapping[str, Any] | None) -> None:
        self.vault.forget(connection, job)
        self._event(connection, job, "state", {"state": state} | ({"failure": failure} if failure else {}))
        self._promote(connection)

    def delete(self, job: str, owner: str) -> Row:
        """Raises JobError for a job that has not ended."""
        with self.database.write() as connection:
            row = self._get(connection, job, owner)
            if row["state"] in ACTIVE:
                raise JobError(f"this job is {row['state']}", "cancel it first")
            connection.execute(jobs.delete().where(jobs.c.id == job))
        self.queue.forget(job, row["attempt"])
        return row

    def _event(self, connection: sa.Connection, job: str, kind: Kind, data: Mapping[str, Any]) -> None:
        counted = jobs.update().where(jobs.c.id == job).values(events=jobs.c.events + 1).returning(jobs.c.events)
        if kind == "log":
            counted = counted.where(jobs.c.events < MAX_EVENTS)
        number = connection.execute(counted).scalar()
        if number is None:
            return
        clean = json.loads(redact(json.dumps(dict(data))))
        if "text" in clean:
            clean["text"] = str(clean["text"])[:MAX_LOG]
        now = self.database.now(connection)
        connection.execute(events.insert().values(job=job, number=number, time=now, kind=kind, data=clean))


def _first(connection: sa.Connection, query: sa.Select[Any]) -> Row | None:
    found = connection.execute(query).mappings().first()
    return None if found is None else dict(found)
