"""A Hub of one's own: real HTTP on the loopback, for the real `huggingface_hub` client.

    with Hub(folder) as hub:
        hub.store.tokens["hf_..."] = "alice"
        HfApi(endpoint=hub.url, token="hf_...").create_repo("alice/model")

Repositories, revisions, commits, pull requests, large files by LFS or Xet, ranges, gated and private errors, and
faults wherever a test wants them.  What is asked of it is written down in `hub.faults.log`.
"""

import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from .faults import Faults
from .oauth import Provider
from .store import Refused, Store
from .xet import Xet


@dataclass(frozen=True)
class Request:
    """A request, taken apart.  `parts` are the segments of the path, each unquoted after the path was split."""

    method: str
    parts: tuple[str, ...]
    query: Mapping[str, str]
    queries: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: str | None
    token: str | None

    def json(self) -> Any:
        return json.loads(self.body or b"null")


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(document: Any, status: int = 200, **headers: str) -> "Answer":
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        return Answer(status, json.dumps(document).encode(), {"Content-Type": "application/json", **named})


@dataclass
class Job:
    """A Job on a Hub's machines; see `jobs.py`.  spec: as it was posted, secrets and all.  lines: its log."""

    id: str
    namespace: str
    spec: dict[str, Any]
    stage: str = "RUNNING"
    message: str | None = None
    lines: Callable[[], list[str]] = list


@dataclass
class Jobs:
    """All Jobs of a Hub.  begun: what happens when one is posted."""

    all: list[Job] = field(default_factory=list)
    begun: Callable[[Job], object] = lambda job: None


class Hub:
    """The server.  Use it in a `with`; `url` is its endpoint, `store` what it holds."""

    def __init__(self, folder: Path) -> None:
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.store, self.faults = Store(folder / "blobs"), Faults()
        self.xet = Xet(folder / "xet")
        self.jobs = Jobs()
        self.oauth = Provider()
        self.seen_tokens: set[str] = set()
        hub = self

        class Bound(Handler):
            owner = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def xet_token(self) -> Answer:
        """Where chunks go: the Python client reads it in the headers, its library in Rust in the body."""
        found = self.xet.token()
        names = {"X-Xet-Cas-Url": "casUrl", "X-Xet-Access-Token": "accessToken", "X-Xet-Token-Expiration": "exp"}
        return Answer.of(found, **{header: str(found[key]) for header, key in names.items()})

    @property
    def files_url(self) -> str:
        """Where large files are: another host name, because the client follows redirects within one host itself and
        then misses the headers of the first answer."""
        return f"http://localhost:{self.port}"

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    owner: Hub
    protocol_version = "HTTP/1.1"
    timeout = 30
    wbufsize = -1  # head and body in one packet: in two, each answer waits 40 ms for the client's acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Nothing: `faults.log` has it."""

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # the client went away
            super().handle()

    def _serve(self) -> None:
        hub = self.owner
        url = urlsplit(self.path)
        fault = hub.faults.next(self.command, url.path)
        if fault == "cut":
            return self._cut()
        body = self._body()
        if fault == "error":
            return self._send(Answer(500, b"", {"X-Error-Message": "Internal Error"}))
        if fault == "busy":
            return self._send(Answer(429, b"", {"Retry-After": "1"}))
        answer = self._answer(url.path, url.query, body)
        if fault == "lost":
            return self._cut()
        self._send(answer, half=fault == "half")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, path: str, query: str, body: bytes) -> Answer:
        from .routes import route

        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        token = given or None if kind == "Bearer" else None
        if token:
            self.owner.seen_tokens.add(token)
        request = Request(
            method=self.command,
            parts=tuple(unquote(part) for part in path.strip("/").split("/")),
            query={key: values[0] for key, values in parse_qs(query).items()},
            queries=parse_qs(query),
            headers={key.lower(): value for key, value in self.headers.items()},
            body=body,
            user=self.owner.store.tokens.get(token or ""),
            token=token,
        )
        try:
            if token and request.user is None and token != self.owner.oauth.run:
                raise Refused(401, message="Invalid credentials in Authorization header")
            return route(self.owner, request)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            return Answer.of({"error": refused.message}, refused.status, X_Error_Message=refused.message, **headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self._line(), 16):
                pieces.append(self._exactly(size))
                self._line()
            self._line()
            return b"".join(pieces)
        return self._exactly(int(self.headers.get("Content-Length") or 0))

    def _line(self) -> bytes:
        if line := self.rfile.readline():
            return line
        raise ConnectionAbortedError("the client went away in the middle of a request")

    def _exactly(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionAbortedError("the client went away in the middle of a request")
        return content

    def _send(self, answer: Answer, half: bool = False) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if half else answer.body)
        if half:
            self._cut()

    def _cut(self) -> None:
        """Close without a word; the client sees its connection reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


Route = Callable[[Hub, Request], Answer]
