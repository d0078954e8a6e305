"""Work on this machine, in a sandboxed child of the worker."""

import os
import time

from ...errors import ResourceError
from ..job import Failure
from ..sandbox import Bounds, Child, Start
from ..settings import Limits
from . import Executor, Poll, Task, too_slow

LOOK = 2.0  # seconds between two looks at how much of the disk a job takes
ENDS = ("done", "failed")
SIGNALS = {
    24: "the work took more processor time than a job may",
    9: "the work was killed, most likely because the machine had no memory left",
}


class Local(Executor):
    """Children of this process.  A handle says nothing to another worker: when this one ends, its children do."""

    remote = False
    interval = 0.2

    def __init__(self, limits: Limits, memory: int, begin: Start | None = None) -> None:
        self._limits, self._memory, self._begin = limits, memory, begin
        self._running: dict[str, _Run] = {}

    def start(self, task: Task) -> str:
        handle = f"{os.getpid()}.{task.key}"
        if handle not in self._running:
            seconds = int(task.seconds) + 1
            bounds = Bounds(
                memory=self._memory,
                file=self._limits.disk,
                cpu=seconds * (os.cpu_count() or 1),
                wall=task.seconds,
            )
            child = Child({"name": task.name, **task.settings}, task.room.tmp, bounds, self._begin)
            self._running[handle] = _Run(child, time.monotonic() + task.seconds)
        return handle

    def poll(self, task: Task, handle: str) -> Poll:
        run = self._running[handle]
        exited = run.child.exited()
        events = list(run.child.heard(0.0 if exited is not None else self.interval))
        if exited is not None or any(event["event"] in ENDS for event in events):
            events += run.child.rest()
        ended = next((event for event in events if event["event"] in ENDS), None)
        told = [event for event in events if event["event"] not in ENDS]
        if ended is None and exited is None:
            self._check(task, run)
            return Poll("running", told)
        if ended is None and not told:  # it went without a word
            self.cancel(task, handle)
            why = SIGNALS.get(-int(exited or 0), f"the work ended without a word ({exited})")
            return Poll("failed", failure=Failure("ResourceError", why, "use a smaller model, or resume the job"))
        if ended is None:
            return Poll("running", told)
        self.cancel(task, handle)
        if ended["event"] == "done":
            return Poll("done", told, ended["result"])
        return Poll("failed", told, failure=Failure(ended["kind"], ended["message"], ended.get("hint")))

    def _check(self, task: Task, run: "_Run") -> None:
        now = time.monotonic()
        if now > run.deadline:
            raise too_slow(task.seconds)
        if now > run.look:
            run.look = now + LOOK
            if task.room.bytes() > self._limits.disk:
                raise ResourceError(
                    f"the job's files take more than {self._limits.disk / 1e9:,.1f} GB of disk, which is all it may",
                    "use a smaller model",
                )

    def cancel(self, task: Task, handle: str) -> None:
        run = self._running.pop(handle, None)
        if run is not None:
            run.child.kill()

    def kill_all(self) -> None:
        """The worker ends, or has lost its work to another."""
        for run in list(self._running.values()):
            run.child.kill()


class _Run:
    def __init__(self, child: Child, deadline: float) -> None:
        self.child, self.deadline, self.look = child, deadline, 0.0
