"""A worker: takes jobs from the queue, one process of it on each machine or several, and takes over from dead ones."""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import psutil
import sqlalchemy as sa
from dbos import DBOS, DBOSConfig

from .claims import Claims
from .database import Database, jobs, quiet
from .executors.hf_jobs import HfJobs
from .executors.local import Local
from .executors.ray import OnRay
from .job import ACTIVE
from .presence import Presence
from .queue import APP, VERSION, Json, Queue
from .sandbox import Start
from .settings import Settings
from .steps import Tools
from .vault import Vault, vault_for
from .watch import Watch, sweep
from .workflow import LOGGER, Conversions, register
from .workspace import Workspace

BEAT = 5.0  # seconds between two signs of life
DEAD = 30.0  # seconds without one after which others take over
SWEEP = 600.0  # seconds between two looks at what can be removed


class Worker:
    """One worker, in this process.  `run` returns when it is told to stop.

    begin: how children are begun.  beat, dead: see BEAT and DEAD.  at_once: jobs that it works on at the same time.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        vault: Vault | None = None,
        at_once: int = 1,
        begin: Start | None = None,
        beat: float = BEAT,
        dead: float = DEAD,
        poll: float = 1.0,
    ) -> None:
        self.settings, self._at_once, self._beat, self._dead, self._poll = settings, at_once, beat, dead, poll
        self.database = Database(settings.database)
        self.database.create()
        self.queue = Queue(self.database)
        kept = vault or vault_for(settings.secret, self.database)
        self.claims = Claims(self.database, self.queue, kept, settings.limits)
        self.workspace = Workspace(settings.folder)
        memory = settings.limits.memory or psutil.virtual_memory().total * 3 // 4 // at_once
        rented = HfJobs(package=settings.package)
        executors = {"local": Local(settings.limits, memory, begin), "hf-jobs": rented, "ray": OnRay()}
        self.presence = Presence(self.database, dead)
        tools = Tools(self.claims, self.workspace, settings, memory, executors)
        self.conversions = Conversions(tools, self.presence.id)
        self.watch = Watch(self.claims, self.queue, self.presence, self.conversions)
        self._stopping = threading.Event()

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Work until `stop` is called, or `until` says so, which is asked at every beat.

        What is under way then is left as after a crash, for others or for the next start, and the process ends.
        """
        quiet()
        self.presence.sign_on()
        self._launch()
        LOGGER.info("worker %s is ready", self.presence.id)
        seen = swept = time.monotonic()
        self.watch.look()
        sweep(self.claims, self.workspace)
        while not self._stopping.wait(self._beat) and not (until is not None and until()):
            try:
                if not self.presence.sign():
                    LOGGER.error("others took this worker for dead and have its jobs: it stops")
                    self._leave(1)
                seen = time.monotonic()
                self.watch.look()
                if time.monotonic() - swept > SWEEP:
                    swept = time.monotonic()
                    sweep(self.claims, self.workspace)
            except sa.exc.OperationalError as error:
                LOGGER.warning("the database does not answer: %s", str(error).partition("\n")[0])
                if time.monotonic() - seen > self._dead:
                    self._leave(1)
        self.presence.sign_off()
        if self.conversions.running:
            self._leave(0)
        DBOS.destroy(destroy_registry=True)

    def stop(self, *_: object) -> None:
        """End `run` soon; also a handler of signals."""
        self._stopping.set()

    def is_idle(self) -> bool:
        """Whether no job waits or runs, of anybody."""
        with self.database.read() as connection:
            return connection.execute(sa.select(jobs.c.id).where(jobs.c.state.in_(ACTIVE))).first() is None

    def _launch(self) -> None:
        config: DBOSConfig = {
            "name": APP,
            "system_database_url": self.database.text,
            "executor_id": self.presence.id,
            "application_version": VERSION,
            "serializer": Json(),
            "log_level": "ERROR",
            "run_migrations": False,
        }
        DBOS(config=config)
        register(self.conversions)
        self.queue.configure(self.settings.limits.running, self._at_once, self._poll)
        DBOS.launch()

    def _leave(self, code: int) -> NoReturn:
        """End this process at once; its children end with it."""
        logging.shutdown()
        os._exit(code)
