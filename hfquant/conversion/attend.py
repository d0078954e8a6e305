"""Waiting for heavy work: what it tells is written down, and when it is not wanted any more it is stopped."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import HfquantError
from .executors import Executor, Task, TaskFailed
from .job import Kind, Unwanted

if TYPE_CHECKING:
    from .steps import Steps

LAYERS = ("share", "layers_done", "layers", "blocks_done", "blocks", "eta")


def attend(executor: Executor, task: Task, steps: "Steps") -> dict[str, Any]:
    """Start a task, or find it running, and stay with it until it ends -> its result.

    Raises TaskFailed, what the executor raises, and Unwanted.
    """
    claims = steps.tools.claims
    handle = executor.start(task)
    claims.note(steps.claim, [], handle=handle)
    try:
        while True:
            seen = executor.poll(task, handle)
            happened = [told for event in seen.events if (told := _told(event, str(task.room.path))) is not None]
            changes: dict[str, Any] = {}
            if shares := [data for kind, data in happened if kind == "layer"]:
                changes["progress"] = {key: shares[-1].get(key) for key in LAYERS}
            if seen.handle is not None and seen.handle != handle:
                changes["handle"] = handle = seen.handle
            if happened or changes:
                claims.note(steps.claim, happened, **changes)
            if seen.failure is not None:
                raise TaskFailed(seen.failure)
            if seen.state == "done":
                return dict(seen.result)
            steps.guard()
            if executor.remote:
                _pause(executor.interval, steps)
    except (Unwanted, HfquantError):
        executor.cancel(task, handle)
        raise


def _pause(seconds: float, steps: "Steps") -> None:
    """Wait, but not for a job that is not wanted any more."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.3))
        steps.guard()


def _told(event: Mapping[str, Any], folder: str) -> tuple[Kind, Mapping[str, Any]] | None:
    """An event of a task as one of the job, without where the job's folder lies."""
    data = {key: value for key, value in event.items() if key != "event"}
    if isinstance(data.get("text"), str):
        data["text"] = data["text"].replace(folder, "the job's folder")
    kinds: dict[str, Kind] = {"plan": "plan", "layer": "layer", "log": "log", "progress": "progress"}
    if event["event"] == "started":
        return "log", {"text": f"the work has begun in a process of its own, network: {event['network']}"}
    return (kinds[event["event"]], data) if event["event"] in kinds else None
