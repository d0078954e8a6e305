"""What a recipe would make of a model, from headers alone: asked of a sandboxed child that stays for the next question.

The config is foreign text that transformers builds modules from.  A child that takes too long over it is killed.
"""

import contextlib
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..model.remote import Tensors
from .executors import TaskFailed
from .job import Failure
from .sandbox import Bounds, Child, Start

MEMORY = 6_000_000_000  # bytes of data that the child may have
PATIENCE = 60.0  # seconds for one question, of which the child's start is a part
LIVES = 500  # questions, after which another child takes over
KEPT = 200  # answers that are remembered


class Planner:
    """One child, begun with the first question.  Safe to use from several threads; they wait for each other."""

    def __init__(self, begin: Start | None = None, patience: float = PATIENCE) -> None:
        self._begin, self._patience = begin, patience
        self._folder = Path(tempfile.mkdtemp(prefix="hfquant-planner-"))
        self._child: Child | None = None
        self._asked = 0
        self._known: OrderedDict[tuple[str, ...], dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Begin the child, which needs seconds until it can answer, before somebody waits for it."""
        with self._lock:
            self._begun()

    def ask(
        self, key: tuple[str, ...], name: str, config: Mapping[str, Any], tensors: Tensors, recipe: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The answer of `tasks.do_layouts`.  key: equal for equal questions.

        Raises TaskFailed with what stands in the way, SourceError where no answer came.
        """
        found = self._known.get(key)  # without waiting for somebody else's answer
        with self._lock if found is None else contextlib.nullcontext():
            if found is None and (found := self._known.get(key)) is None:
                found = self._ask(
                    {"name": name, "config": config, "tensors": tensors, "recipe": recipe, "memory": None}
                )
                self._known[key] = found
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
        if "problem" in found:
            raise TaskFailed(Failure(**found["problem"]))
        return found

    def _begun(self) -> Child:
        if self._child is None or self._child.exited() is not None or self._asked % LIVES == LIVES - 1:
            self._kill()
            self._child = Child({"name": "layouts"}, self._folder, Bounds(memory=MEMORY), self._begin)
        return self._child

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        child = self._begun()
        self._asked += 1
        child.send({"id": self._asked, **question})
        until = time.monotonic() + self._patience
        while time.monotonic() < until and child.exited() is None:
            for event in child.heard(0.5):
                if event["event"] == "layout" and event["id"] == self._asked:
                    return {name: value for name, value in event.items() if name not in ("event", "id")}
        self._kill()
        raise SourceError(
            "it could not be found out what the recipe would make of this model",
            "its config may be damaged, or made to cause harm; try again",
        )

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._kill()
            shutil.rmtree(self._folder, ignore_errors=True)
