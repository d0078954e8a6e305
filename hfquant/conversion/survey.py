"""What a model's page, config and headers say, asked of the Hub with the caller's rights; what cannot change is kept.

Who looks at costs changes the recipe, not the model: a commit's files are read once, its page each time.
"""

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ..model.hub import understood
from ..model.remote import Look, Tensors, Token, look, read_config, read_headers
from .retry import insisting

KEPT = 32  # models
MINUTES = 5.0  # after which it is asked again whether the caller may still read the files
MOST = 20_000  # tensors of a model that is kept

Seen = tuple[Look, Mapping[str, Any], Tensors]


class Survey:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, ...], tuple[float, Mapping[str, Any], Tensors]] = OrderedDict()
        self._lock = threading.Lock()

    def see(self, model: str, revision: str, token: Token, until: float = math.inf) -> Seen:
        """A model's page as it is now, its config and the headers of its files.  Raises SourceError, HubError.

        until: by `time.monotonic()`, how long a Hub that is busy is asked again.
        """
        with understood(model, revision):
            seen = insisting(lambda: look(model, revision, token), until)
            key = (model, seen.commit, _reader(token))
            if (known := self._recall(key)) is not None:
                return seen, *known
            config, tensors = read_config(seen, token), read_headers(seen, token)
        if len(tensors) <= MOST:
            self._keep(key, config, tensors)
        return seen, config, tensors

    def _recall(self, key: tuple[str, ...]) -> tuple[Mapping[str, Any], Tensors] | None:
        with self._lock:
            at, *known = self._known.get(key, (0.0, {}, {}))
            if time.monotonic() - at > 60 * MINUTES or not at:
                return None
            self._known.move_to_end(key)
            return known[0], known[1]

    def _keep(self, key: tuple[str, ...], config: Mapping[str, Any], tensors: Tensors) -> None:
        with self._lock:
            self._known[key] = time.monotonic(), config, tensors
            self._known.move_to_end(key)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)


def _reader(token: Token) -> str:
    """Whose rights they were read with; no token is kept."""
    return hashlib.sha256(token.encode()).hexdigest() if isinstance(token, str) else str(token)
