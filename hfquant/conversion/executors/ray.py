"""Work on the nodes of a Ray cluster, which need hfquant and a way to the Hub, but no disk in common.

Each attempt is one detached actor, named by its key: a worker that died leaves it, and the next one finds it.  Ray
begins the actor of a lost node again on another one; it comes up with nothing, and whoever polls it hands it its task
and token once more.  So the token is in the memory of the actor and of the worker, never in Ray's own records.
"""

import re
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import HfquantError, RequestError
from ...nodes import connected
from ..job import Failure
from . import Executor, Poll, Task

NAMESPACE = "hfquant"
RESTARTS = 20  # of an actor whose node was lost
PATIENCE = 30.0  # seconds that an actor is waited for before it is taken for one that is being begun again
HARDWARE = re.compile(r"(cpu|gpu)-([1-9]\d{0,2})", re.ASCII)


class OnRay(Executor):
    """A handle is `name of the actor#events that were read`."""

    remote = True

    def __init__(self, interval: float = 2.0, address: str = "auto") -> None:
        self.interval, self._address = interval, address

    def start(self, task: Task) -> str:
        return task.known or f"{task.key}#0"

    def poll(self, task: Task, handle: str) -> Poll:
        ray, (name, _, read) = connected(self._address), handle.partition("#")
        actor = self._actor(ray, name, task)
        try:
            said = ray.get(actor.poll.remote(int(read)), timeout=PATIENCE)
            if said["state"] == "idle":
                ray.get(actor.begin.remote(dict(task.settings), task.token), timeout=PATIENCE)
                return Poll("running", handle=f"{name}#0")
        except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
            return Poll("running")  # no node has room for it yet, or it is begun again on another one
        except ray.exceptions.RayActorError as error:
            why = f"the cluster lost this work for good: {type(error).__name__}"
            return Poll("failed", failure=Failure("ResourceError", why, "resume the job"))
        if said["state"] != "running":
            ray.kill(actor)
        failure = Failure(**said["failure"]) if said["failure"] else None
        handle = f"{name}#{said['read']}"
        return Poll(said["state"], said["events"], said["result"], failure, handle)

    def _actor(self, ray: Any, name: str, task: Task) -> Any:
        """The one that runs, or a new one."""
        return (
            ray.remote(Runner)
            .options(
                name=name, namespace=NAMESPACE, get_if_exists=True, lifetime="detached", max_restarts=RESTARTS,
                max_concurrency=4, **needs(task.hardware),
            )
            .remote()
        )  # fmt: skip

    def cancel(self, task: Task, handle: str) -> None:
        ray = connected(self._address)
        with suppress(ValueError):  # it has ended
            ray.kill(ray.get_actor(handle.partition("#")[0], namespace=NAMESPACE))


def needs(hardware: str | None) -> dict[str, int]:
    """What an actor takes of a node: `cpu-4`, or `gpu-1`; a core if nothing is said.  Raises RequestError."""
    found = HARDWARE.fullmatch(hardware or "cpu-1")
    if found is None:
        raise RequestError(f"a Ray cluster has no hardware `{hardware}`", "give `cpu-4`, or `gpu-1`")
    return {f"num_{found[1]}s": int(found[2])}


class Runner:
    """An actor: one conversion, in a thread."""

    def __init__(self) -> None:
        self._lock, self._events = threading.Lock(), list[Mapping[str, Any]]()
        self._state, self._result, self._failure = "idle", dict[str, Any](), dict[str, Any]()

    def begin(self, settings: Mapping[str, Any], token: str) -> None:
        """Once; asked again it goes on with what it is at."""
        with self._lock:
            if self._state != "idle":
                return
            self._state = "running"
        threading.Thread(target=self._run, args=(settings, token), daemon=True).start()

    def poll(self, read: int) -> dict[str, Any]:
        """state, what happened since the event of that number, result, failure."""
        with self._lock:
            return {
                "state": self._state, "events": self._events[read:], "read": len(self._events),
                "result": self._result, "failure": self._failure or None,
            }  # fmt: skip

    def _run(self, settings: Mapping[str, Any], token: str) -> None:
        from ..remote import convert
        from ..workflow import explain

        with tempfile.TemporaryDirectory(prefix="hfquant-") as folder:
            try:
                result = convert(settings, token, Path(folder), self._tell)
                self._end("done", result=result)
            except (HfquantError, OSError) as error:
                self._end("failed", failure=explain(error, lambda text: text.replace(folder, "the job's folder")))
            except Exception as error:  # the thread ends here, and the job with it
                self._end("failed", failure=explain(error, str))

    def _tell(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._events.append(event)

    def _end(self, state: str, result: Mapping[str, Any] | None = None, failure: Failure | None = None) -> None:
        with self._lock:
            self._state, self._result = state, dict(result or {})
            self._failure = {} if failure is None else vars(failure)
