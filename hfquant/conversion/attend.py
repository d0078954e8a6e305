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
    board = steps.tools.board
    handle = executor.start(task)
    board.note(steps.claim, [], handle=handle)
    try:
        while True:
            seen = executor.poll(task, handle)
            happened = [told for event in seen.events if (told := _told(event)) is not None]
            changes: dict[str, Any] = {}
            if shares := [data for kind, data in happened if kind == "layer"]:
                changes["progress"] = {key: shares[-1].get(key) for key in LAYERS}
            if seen.handle is not None and seen.handle != handle:
                changes["handle"] = handle = seen.handle
            if happened or changes:
                board.note(steps.claim, happened, **changes)
            if seen.failure is not None:
                raise TaskFailed(seen.failure)
            if seen.state == "done":
                return dict(seen.result)
            steps.guard()
            if executor.remote:
                time.sleep(executor.interval)
    except (Unwanted, HfquantError):
        executor.cancel(task, handle)
        raise


def _told(event: Mapping[str, Any]) -> tuple[Kind, Mapping[str, Any]] | None:
    """An event of a task as one of the job."""
    data = {key: value for key, value in event.items() if key != "event"}
    kinds: dict[str, Kind] = {"plan": "plan", "layer": "layer", "log": "log", "progress": "progress"}
    if event["event"] == "started":
        return "log", {"text": f"the work has begun in a process of its own, network: {event['network']}"}
    return (kinds[event["event"]], data) if event["event"] in kinds else None
