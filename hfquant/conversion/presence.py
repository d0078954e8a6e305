"""Which workers are alive: each gives signs of life in the database, by the database's clock."""

import logging
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from .database import Database, workers

DAY = 86400.0
LOGGER = logging.getLogger("hfquant.worker")


class Presence:
    """This process as a worker among others.  dead: seconds without a sign after which it is taken for dead.

    Every start is another worker, with an `id` of its own: two processes never share one.
    """

    def __init__(self, database: Database, dead: float) -> None:
        self._database, self._dead = database, dead
        self.id = f"{socket.gethostname()[:60]}-{secrets.token_hex(4)}"

    def sign_on(self) -> None:
        with self._database.write() as connection:
            now = self._database.now(connection)
            mine = {"id": self.id, "host": host(), "process": process(os.getpid()), "seen": now}
            connection.execute(workers.insert().values(**mine, alive=True))

    def sign(self) -> bool:
        """Give a sign of life; False if it came too late, and others have this worker's jobs."""
        with self._database.write() as connection:
            mine = workers.update().where(workers.c.id == self.id, workers.c.alive)
            return connection.execute(mine.values(seen=self._database.now(connection))).rowcount == 1

    def sign_off(self) -> None:
        with self._database.write() as connection:
            connection.execute(workers.update().where(workers.c.id == self.id).values(alive=False))

    def living(self) -> set[str]:
        """The workers that are alive.  Those that are not are declared dead, after which they may not go on."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            known = [dict(row) for row in connection.execute(sa.select(workers).where(workers.c.alive)).mappings()]
            dead = [row["id"] for row in known if row["id"] != self.id and self._is_dead(row, now)]
            if dead:
                connection.execute(workers.update().where(workers.c.id.in_(dead)).values(alive=False))
            connection.execute(workers.delete().where(~workers.c.alive, workers.c.seen < now - DAY))
        for worker in dead:
            LOGGER.warning("worker %s is dead", worker)
        return {row["id"] for row in known} - set(dead)

    def _is_dead(self, row: Mapping[str, Any], now: float) -> bool:
        """No sign for too long, or a process of this machine that is not there any more."""
        if row["seen"] < now - self._dead:
            return True
        return row["host"] == host() and process(int(row["process"].partition("/")[0])) != row["process"]


def host() -> str:
    """This machine since its last start, and the world of process numbers that this process lives in."""
    boot, world = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()[:100]]
    if boot.is_file() and world.exists():
        parts += [boot.read_text().strip(), str(world.stat().st_ino)]
    return "/".join(parts)


def process(number: int) -> str:
    """Names a process even when its number is given to another later; that of no process ends in a dash."""
    try:
        found = psutil.Process(number)
        return f"{number}/-" if found.status() == psutil.STATUS_ZOMBIE else f"{number}/{found.create_time():.2f}"
    except psutil.NoSuchProcess:
        return f"{number}/-"
