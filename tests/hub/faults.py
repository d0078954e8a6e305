"""What goes wrong with a Hub: at a chosen request, or from one on."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["cut", "lost", "half", "error", "busy", "down"]


@dataclass
class Fault:
    """kind: `cut` closes the connection before the request is handled; `lost` handles it and closes before the answer;
    `half` sends half of the answer's body; `error` answers 500; `busy` 429; `down` cuts this request and all after it.

    at: the how-manieth matching request, from 0.  times: how many in a row.
    """

    kind: Kind
    at: int = 0
    times: int = 1
    matches: Callable[[str, str], bool] = lambda method, path: True
    seen: int = 0


@dataclass
class Faults:
    """The faults to come, and the log of what was asked: "METHOD path"."""

    planned: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    down: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: Kind, at: int = 0, times: int = 1, matches: Callable[[str, str], bool] | None = None) -> None:
        self.planned.append(Fault(kind, at, times, *([matches] if matches else [])))

    def clear(self) -> None:
        """Everything works again; what was asked is forgotten."""
        self.planned.clear()
        self.log.clear()
        self.down = False

    def next(self, method: str, path: str) -> Kind | None:
        """What is to happen to this request."""
        with self.lock:
            self.log.append(f"{method} {path}")
            if self.down:
                return "cut"
            for fault in self.planned:
                if not fault.matches(method, path):
                    continue
                fault.seen += 1
                if fault.at < fault.seen <= fault.at + fault.times:
                    self.down = fault.kind == "down"
                    return "cut" if fault.kind == "down" else fault.kind
        return None

    def asked(self, method: str, part: str) -> list[str]:
        """The requests so far of that method whose path contains `part`."""
        return [entry for entry in self.log if entry.startswith(f"{method} ") and part in entry]
