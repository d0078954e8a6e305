"""The service's own tables, beside those of DBOS in one database: SQLite, or the same on PostgreSQL."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, OperationalError

from ..errors import RequestError

PATIENCE = 20.0  # seconds that a server which does not answer is waited for
LOCK = 0x68667175616E74  # of PostgreSQL: whoever plans holds it until its transaction ends

metadata = sa.MetaData()

jobs = sa.Table(
    "hfquant_jobs",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("key", sa.String(64), nullable=False),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("request", sa.JSON, nullable=False),  # with the recipe in full; no calibration text
    sa.Column("text", sa.Text),  # calibration text that came with the request
    sa.Column("revision", sa.String(40), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("fresh", sa.Boolean, nullable=False),  # whether this attempt starts from nothing
    sa.Column("released", sa.Boolean, nullable=False),  # whether the result was reviewed, or need not be
    sa.Column("own_login", sa.Boolean, nullable=False),  # whether the worker's own login is used
    sa.Column("with_token", sa.Boolean, nullable=False),  # whether it cannot go on without its owner's token
    sa.Column("facts", sa.JSON),  # what the original's page says: licence, gate
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("queued", sa.Float, nullable=False),  # when this attempt was asked for
    sa.Column("started", sa.Float),
    sa.Column("finished", sa.Float),
    sa.Column("dispatched", sa.Boolean, nullable=False),  # whether DBOS has it
    sa.Column("worker", sa.String(100)),
    sa.Column("place", sa.String(32)),  # the folder of the workers that its files are in
    sa.Column("handle", sa.String(200)),  # of work on another machine
    sa.Column("steps", sa.JSON, nullable=False),
    sa.Column("progress", sa.JSON, nullable=False),
    sa.Column("failure", sa.JSON),
    sa.Column("pushed", sa.JSON),
    sa.Column("report", sa.Text),
    sa.Column("card", sa.Text),
    sa.Column("events", sa.Integer, nullable=False, default=0),  # how many there are
    sa.UniqueConstraint("owner", "key"),
    sa.Index("hfquant_jobs_state", "state", "priority", "queued"),
)

events = sa.Table(
    "hfquant_events",
    metadata,
    sa.Column("job", sa.String(32), sa.ForeignKey("hfquant_jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("kind", sa.String(12), nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)

figures = sa.Table(  # of the card
    "hfquant_figures",
    metadata,
    sa.Column("job", sa.String(32), sa.ForeignKey("hfquant_jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.String(100), primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)

tokens = sa.Table(
    "hfquant_tokens",
    metadata,
    sa.Column("job", sa.String(32), sa.ForeignKey("hfquant_jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("sealed", sa.Text, nullable=False),
    sa.Column("expires", sa.Float),
)

workers = sa.Table(
    "hfquant_workers",
    metadata,
    sa.Column("id", sa.String(100), primary_key=True),
    sa.Column("host", sa.String(200), nullable=False),
    sa.Column("process", sa.String(100), nullable=False),
    sa.Column("seen", sa.Float, nullable=False),
    sa.Column("alive", sa.Boolean, nullable=False),
)

arrivals = sa.Table(
    "hfquant_arrivals",
    metadata,
    sa.Column("repo", sa.String(200), primary_key=True),
    sa.Column("commit", sa.String(40), primary_key=True),
    sa.Column("arrived", sa.Float, nullable=False),
    sa.Column("handled", sa.Float),
    sa.Column("failures", sa.Integer, nullable=False, default=0),
)


class Database:
    """Connections to one database.  `read` and `write` are transactions; only one `write` happens at a time."""

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite and self.url.database:
            Path(self.url.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.engine = sa.create_engine(self.url, pool_pre_ping=not self.is_sqlite)
        if self.is_sqlite:
            _manual_transactions(self.engine)

    @cached_property
    def text(self) -> str:
        """The URL as DBOS wants it, password and all: for its configuration only."""
        plain = self.url if self.is_sqlite else self.url.set(drivername="postgresql")
        return plain.render_as_string(hide_password=False)

    def create(self) -> None:
        """Make all tables that are not there, DBOS' too."""
        from dbos import DBOS

        quiet()
        if self.is_sqlite:
            with self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # who reads does not wait for who writes
        DBOS.migrate(self.text)
        with self.write() as connection:
            metadata.create_all(connection)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        with self._connection() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction in which what is read stays true until it ends: limits are checked, then changed."""
        with self._connection() as connection:
            if self.is_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            yield connection
            connection.commit()

    def _connection(self) -> sa.Connection:
        """A connection; a server that is about to be there again is waited for."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return self.engine.connect()
            except OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(1.0)

    def now(self, connection: sa.Connection) -> float:
        """Seconds since 1970 by the database's clock, which is the same for all workers."""
        clock = (
            "SELECT (julianday('now') - 2440587.5) * 86400.0" if self.is_sqlite else "SELECT extract(epoch FROM now())"
        )
        return float(connection.execute(sa.text(clock)).scalar_one())

    def close(self) -> None:
        self.engine.dispose()


def _checked(url: str) -> sa.URL:
    try:
        found = sa.make_url(url)
    except ArgumentError:
        raise RequestError(
            "the database's address cannot be read", "write `sqlite:////path/jobs.sqlite` or `postgresql://...`"
        ) from None
    if found.get_backend_name() == "postgresql":
        return found.set(drivername="postgresql+psycopg")
    if found.get_backend_name() != "sqlite" or not found.database or found.database == ":memory:":
        raise RequestError(
            f"the service cannot use the database `{found.get_backend_name()}`",
            "write `sqlite:////path/jobs.sqlite` or `postgresql://...`",
        )
    return found


def _manual_transactions(engine: sa.Engine) -> None:
    """Leave it to `Database.write` where a transaction begins: Python's driver would begin it after the first read."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA busy_timeout=30000")
        connection.execute("PRAGMA foreign_keys=ON")


def quiet() -> None:
    """DBOS tells of every start and step; what matters is told here."""
    logging.getLogger("dbos").setLevel(logging.ERROR)
