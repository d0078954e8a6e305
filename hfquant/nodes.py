"""Other machines, by way of Ray.  Nothing heavy is imported here."""

import logging
import threading
from typing import Any

from .errors import ResourceError

_LOCK = threading.Lock()  # Ray is connected to once, whoever asks first


def connected(address: str) -> Any:
    """Ray, connected to a cluster.  Raises ResourceError."""
    try:
        import ray
    except ImportError:
        raise ResourceError("a cluster needs the package `ray`", "`pip install 'hfquant[ray]'`") from None
    with _LOCK:
        if not ray.is_initialized():
            where = {} if address == "local" else {"address": address}
            try:
                ray.init(**where, logging_level=logging.WARNING, log_to_driver=False, include_dashboard=None)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ResourceError(
                    f"there is no Ray cluster at `{address}`: {str(error).partition(chr(10))[0]}",
                    "`ray start --head` begins one; `local` works with this machine alone",
                ) from None
            except Exception as error:  # Ray has no class for it: a node has half a minute to begin
                if "timed out during startup" not in str(error):
                    raise
                raise ResourceError(
                    "Ray's node on this machine did not begin in time",
                    "other work keeps the machine busy: run the same command again",
                ) from error
    return ray
