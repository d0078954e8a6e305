"""How the service is set up: where its data lies, and what it allows.  From the environment, or given in Python."""

import getpass
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from .. import __version__

GB = 1_000_000_000


def own_user(environment: Mapping[str, str] = os.environ) -> str:
    """Whose jobs they are where nobody logs in: HFQUANT_USER, or the user of the machine.

    The same for the command line, fleets and the page: what one asked for, the others show.
    """
    if given := environment.get("HFQUANT_USER"):
        return given
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user may have no name
        return "local"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one user, one job and the service as a whole may take.  Times in seconds."""

    running_per_user: int = 1
    queued_per_user: int = 3
    jobs_per_day: int = 50  # of one user
    queued: int = 100  # of everybody
    running: int = 8  # of everybody, on all workers
    parameters: int = 20_000_000_000  # of the original
    disk: int = 100 * GB  # of one job's folder
    memory: int | None = None  # of the child process; None: three quarters of the machine's
    seconds: int = 6 * 3600  # of one job's work
    usd: float = 20.0  # of one job on rented hardware
    keep_days: float = 30.0  # how long histories are kept, and results that were not pushed


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How results are measured: windows of the packaged text, tokens in each, tokens of the samples."""

    windows: int = 64
    window_len: int = 512
    new_tokens: int = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """database: an SQLAlchemy URL, SQLite or PostgreSQL.  folder: where jobs work, on the workers' disk.

    secret: a Fernet key that seals tokens on their way from the service to a worker; without one, tokens stay in the
    memory of the process that took them, and only a worker in that process can use them.
    measuring: the same for all jobs, so that results can be compared.
    own_login: whether jobs without a token use the login of the machine; for one's own machine only.
    package: what a rented machine installs, as `pip` takes it: this version of hfquant, or the address of a wheel.
    """

    database: str
    folder: Path
    secret: str | None = field(default=None, repr=False)
    limits: Limits = Limits()
    measuring: Measuring = Measuring()
    own_login: bool = False
    package: str = f"hfquant=={__version__}"

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ, **changes: object) -> Self:
        """From HFQUANT_DATABASE, _FOLDER, _SECRET and _PACKAGE; what is not set lies in the user's data folder."""
        home = Path(environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "hfquant"
        folder = Path(environment.get("HFQUANT_FOLDER") or home)
        given: dict[str, object] = {
            "database": environment.get("HFQUANT_DATABASE") or f"sqlite:///{folder / 'jobs.sqlite'}",
            "folder": folder,
            "secret": environment.get("HFQUANT_SECRET") or None,
        }
        if package := environment.get("HFQUANT_PACKAGE"):
            given["package"] = package
        return cls(**(given | changes))  # type: ignore[arg-type]
