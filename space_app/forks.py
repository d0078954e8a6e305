"""Forks of a process that talks to the Hub in other threads.

`huggingface_hub` closes its client in every forked child.  That needs the lock of the client's connections, and if
another thread held it at the fork, nobody is there to give it back: the child waits for ever.
"""

import functools
import os
import threading
from typing import Any

from huggingface_hub.utils import _http


@functools.cache
def spare() -> None:
    """From now on this process's forks find no client of the Hub to close; other threads keep theirs."""
    turn = threading.Lock()  # one fork at a time: another one's client would be put back in the midst of this one
    aside: list[Any] = []

    def before() -> None:
        turn.acquire()
        aside.append(_http._GLOBAL_CLIENT)
        _http._GLOBAL_CLIENT = None

    def after(kept: bool) -> None:
        client = aside.pop()
        if kept and _http._GLOBAL_CLIENT is None:
            _http._GLOBAL_CLIENT = client
        turn.release()

    os.register_at_fork(
        before=before, after_in_parent=lambda: after(kept=True), after_in_child=lambda: after(kept=False)
    )
