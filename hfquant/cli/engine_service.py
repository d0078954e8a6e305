"""The calls of the command line into the conversion service."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .engine import quiet

if TYPE_CHECKING:
    from ..conversion.service import Service
    from ..conversion.settings import Settings
    from ..conversion.worker import Worker


def service() -> "Service":
    """The conversion service of this machine, or the one that HFQUANT_DATABASE names."""
    settings = _settings()
    from ..conversion.service import Service

    return Service(settings)


def worker(at_once: int, windows: int | None, limits: Mapping[str, Any]) -> "Worker":
    """A worker of that service."""
    settings = _settings()
    quiet()
    from ..conversion.redact import log_to_stderr
    from ..conversion.settings import Measuring
    from ..conversion.worker import Worker

    log_to_stderr()
    given = {name: value for name, value in limits.items() if value is not None}
    measuring = settings.measuring if windows is None else Measuring(windows=windows)
    changed = replace(settings, limits=replace(settings.limits, **given), measuring=measuring)
    return Worker(changed, at_once=at_once)


def new_secret() -> str:
    _settings()
    from ..conversion.vault import new_secret

    return new_secret()


def _settings() -> "Settings":
    """From the environment.  Without a secret it is one's own machine, whose login is used.

    Raises RequestError where the packages for it are not installed.
    """
    missing = [name for name in ("dbos", "sqlalchemy", "cryptography") if find_spec(name) is None]
    if missing:
        raise RequestError(f"the service needs the package `{missing[0]}`", "`pip install 'hfquant[service]'`")
    from ..conversion.settings import Settings

    settings = Settings.read()
    return replace(settings, own_login=settings.secret is None)
