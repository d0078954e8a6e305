"""What webhooks told, kept until it is handled: each commit of each repository once, however often it is told."""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from ..database import Database, arrivals

PATIENCE = 5  # times that a commit is handled before it is given up: the schedule finds it later


@dataclass(frozen=True)
class Arrival:
    """A repository whose main branch is now at this commit."""

    repo: str
    commit: str


class Inbox:
    """Arrivals in the service's database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, arrival: Arrival) -> bool:
        """Keep it; False if it is known."""
        insert = sqlite.insert if self._database.is_sqlite else postgresql.insert
        with self._database.write() as connection:
            row = {
                "repo": arrival.repo,
                "commit": arrival.commit,
                "arrived": self._database.now(connection),
                "failures": 0,
            }
            done = connection.execute(insert(arrivals).values(**row).on_conflict_do_nothing())
            return bool(done.rowcount)

    def waiting(self) -> list[Arrival]:
        """What is not handled yet, oldest first."""
        wanted = sa.select(arrivals.c.repo, arrivals.c.commit).where(
            arrivals.c.handled.is_(None), arrivals.c.failures < PATIENCE
        )
        with self._database.read() as connection:
            return [Arrival(*row) for row in connection.execute(wanted.order_by(arrivals.c.arrived))]

    def handled(self, arrival: Arrival) -> None:
        with self._database.write() as connection:
            self._update(connection, arrival, handled=self._database.now(connection))

    def failed(self, arrival: Arrival) -> None:
        """To be handled again, some more times."""
        with self._database.write() as connection:
            self._update(connection, arrival, failures=arrivals.c.failures + 1)

    def _update(self, connection: sa.Connection, arrival: Arrival, **values: object) -> None:
        mine = arrivals.c.repo == arrival.repo, arrivals.c.commit == arrival.commit
        connection.execute(arrivals.update().where(*mine).values(**values))
