"""What another machine runs: fetch, compress, measure, judge, push.  A Job of the Hub is told of it by its environment
and heard by its log; a Ray cluster calls `convert`.

The work itself is done in a sandboxed child here too: the token stays with this process.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from .. import report
from ..errors import HfquantError, QualityError
from ..model.hub import facts, understood
from ..model.remote import look
from . import hub
from .child import Tell
from .executors import Task, TaskFailed
from .executors.hf_jobs import MARK
from .executors.local import Local
from .pull import pull
from .settings import Limits
from .workflow import explain
from .workspace import Room


def tell(event: Mapping[str, Any]) -> None:
    print(f"{MARK}{json.dumps(dict(event), default=str)}", flush=True)


def convert(task: Mapping[str, Any], token: str, folder: Path, tell: Tell) -> dict[str, Any]:
    """One conversion, from nothing to pushed -> where it is.  tell: hears what happens.  Raises HfquantErrors."""
    room = Room(folder)
    room.enter(1, fresh=False)
    with understood(task["model"], task["revision"]):
        seen = look(task["model"], task["revision"], token)
    pull(seen, room.source, token, lambda: None, lambda text: tell({"event": "progress", "text": text}))
    if task["text"] is not None:
        room.text.write_text(task["text"], encoding="utf-8")
    memory = psutil.virtual_memory().total * 3 // 4
    settings = {
        "source": str(room.source), "out": str(room.out), "model": task["model"], "revision": task["revision"],
        "recipe": task["recipe"], "memory": int(memory * 0.8), "facts": facts(seen.info),
        "measuring": task["measuring"], "text": None if task["text"] is None else str(room.text),
    }  # fmt: skip
    local = Local(Limits(disk=psutil.disk_usage(str(folder)).total), memory)
    for name in ("compress", "evaluate"):
        _attend(local, Task(name, "remote", name, room, settings, task["seconds"]), tell)
    verdict = report.read(room.out).get("gate") or {}
    if not verdict.get("passed"):
        failures = "\n".join(f"- {failure}" for failure in verdict.get("broken") or ())
        raise QualityError(f"the result is below its recipe's gate, nothing was pushed:\n{failures}", "use more bits")
    tell({"event": "progress", "text": "pushing"})
    done = hub.push(room.out, task["target"], private=task["private"], pr=task["pull_request"], token=token)
    return {"repo": done.repo, "url": done.url, "commit": done.commit, "pull_request": done.pull_request}


def _attend(local: Local, task: Task, tell: Tell) -> None:
    handle = local.start(task)
    try:
        while True:
            seen = local.poll(task, handle)
            for event in seen.events:
                tell(event)
            if seen.failure is not None:
                raise TaskFailed(seen.failure)
            if seen.state == "done":
                return
    finally:
        local.cancel(task, handle)


def main() -> int:
    """0 if the result was pushed; what went wrong is the last event."""
    task, token = json.loads(os.environ.pop("HFQUANT_TASK")), os.environ.pop("HF_TOKEN")
    with tempfile.TemporaryDirectory(prefix="hfquant-") as folder:
        try:
            tell({"event": "done", "result": convert(task, token, Path(folder), tell)})
        except (HfquantError, OSError) as error:
            tell({"event": "failed", **vars(explain(error, lambda text: text.replace(folder, "the job's folder")))})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
