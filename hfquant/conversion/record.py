"""What the jobs' owners and the workers share: a job's row, its events, and which jobs wait for their turn."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from .database import Database, events, jobs
from .job import ACTIVE, Kind, State
from .queue import Queue
from .redact import redact
from .settings import Limits
from .vault import Vault

Row = dict[str, Any]
DAY = 86400.0
MAX_EVENTS = 20_000  # of one job; logs end there, the rest goes on
MAX_LOG = 2_000  # characters of one line


class Record:
    """Jobs in the database, with the queue behind them."""

    def __init__(self, database: Database, queue: Queue, vault: Vault, limits: Limits) -> None:
        self.database, self.queue, self.vault, self.limits = database, queue, vault, limits

    def find(self, job: str) -> Row | None:
        """A job, whoever's: for workers."""
        with self.database.read() as connection:
            return first(connection, sa.select(jobs).where(jobs.c.id == job))

    def now(self) -> float:
        """Seconds since 1970 by the database's clock."""
        with self.database.read() as connection:
            return self.database.now(connection)

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

    def _end(self, connection: sa.Connection, job: str, state: State, failure: Mapping[str, Any] | None) -> None:
        self.vault.forget(connection, job)
        self._event(connection, job, "state", {"state": state} | ({"failure": failure} if failure else {}))
        self._promote(connection)

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


def first(connection: sa.Connection, query: sa.Select[Any]) -> Row | None:
    found = connection.execute(query).mappings().first()
    return None if found is None else dict(found)
