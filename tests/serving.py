"""An application of the package, on a real server."""

import socket
import threading
import time
from typing import Any

import uvicorn


class serving:
    """Within: an application answers on loopback; gives its URL."""

    def __init__(self, app: Any) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        # idle connections stay: a worker is a fork that holds them open, so that a browser would not see them end, and
        # ask on where nobody listens
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, timeout_keep_alive=3600)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        until = time.monotonic() + 60
        while not self._server.started:
            assert time.monotonic() < until
            time.sleep(0.02)
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)
        self._socket.close()
