"""The calls of the command line into the conversion service."""

import os
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


def service(**limits: Any) -> "Service":
    """The conversion service of this machine, or the one that HFQUANT_DATABASE names, some of its limits changed."""
    settings = _settings()
    from ..conversion.service import Service

    return Service(replace(settings, limits=replace(settings.limits, **limits)))


def user(given: str | None = None) -> str:
    """Whose jobs are meant: the user that was given, otherwise the machine's own."""
    if given:
        return given
    from ..conversion.settings import own_user

    return own_user()


def token() -> str | None:
    """A token that goes to the worker with a job: only where there is a secret to seal it with.

    Without one the worker uses the login of the machine that it runs on.
    """
    if not os.environ.get("HFQUANT_SECRET"):
        return None
    from huggingface_hub import get_token

    return get_token()


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
