"""Work on the Hub's own machines: one Job for each attempt, paid by the job's owner.

A Job carries the attempt's key as a label.  Before one is begun, the label is looked for: a worker that died between
asking for the Job and hearing of it leaves one Job, and the next worker finds it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ... import __version__
from ...errors import LimitError, RequestError
from ..facts import Hardware
from ..job import Failure
from ..retry import patiently
from . import Executor, Poll, Task

LABEL = "hfquant"
IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
MARK = "hfquant: "  # begins the lines of a Job's log that are events
ENDED = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
FIRST_MINUTES = 10 * 60  # seconds that a Job needs to install hfquant


class HfJobs(Executor):
    """package: what `uv` installs in the Job.  A handle is `namespace/id#lines of its log that were read`."""

    remote = True

    def __init__(self, interval: float = 10.0, package: str = f"hfquant=={__version__}", image: str = IMAGE) -> None:
        self.interval, self._package, self._image = interval, package, image

    def start(self, task: Task) -> str:
        api = HfApi(token=task.token)
        namespace = str(patiently(api.whoami)["name"])
        if task.known is not None and task.known.startswith(f"{namespace}/"):
            return task.known
        return patiently(lambda: self._find(api, namespace, task) or self._begin(api, namespace, task))

    def _find(self, api: HfApi, namespace: str, task: Task) -> str | None:
        for found in api.list_jobs(namespace=namespace, labels={LABEL: task.key}):
            return f"{namespace}/{found.id}#0"
        return None

    def _begin(self, api: HfApi, namespace: str, task: Task) -> str:
        run = ["uv", "run", "--no-project", "--with", self._package, "python", "-m", "hfquant.conversion.remote"]
        begun = api.run_job(
            image=self._image,
            command=run,
            env={"HFQUANT_TASK": json.dumps(task.settings)},
            secrets={"HF_TOKEN": task.token},
            flavor=task.hardware,
            timeout=int(task.seconds) + FIRST_MINUTES,
            labels={LABEL: task.key},
            namespace=namespace,
        )
        return f"{namespace}/{begun.id}#0"

    def poll(self, task: Task, handle: str) -> Poll:
        api, (namespace, job, read) = HfApi(token=task.token), _parts(handle)
        stage = patiently(lambda: api.inspect_job(job_id=job, namespace=namespace)).status
        lines = patiently(lambda: list(api.fetch_job_logs(job_id=job, namespace=namespace)))
        events = [_event(line) for line in lines[read:]]
        handle = f"{namespace}/{job}#{max(read, len(lines))}"
        told = [event for event in events if event["event"] not in ("done", "failed")]
        if stage.stage not in ENDED:
            return Poll("running", told, handle=handle)
        ended = next((e for e in map(_event, reversed(lines)) if e["event"] in ("done", "failed")), None)
        if ended is not None and ended["event"] == "done":
            return Poll("done", told, ended["result"], handle=handle)
        if ended is not None:
            failure = Failure(str(ended["kind"]), str(ended["message"]), ended.get("hint"))
            return Poll("failed", told, failure=failure, handle=handle)
        why = f"the Job ended as {stage.stage}: {stage.message or 'it said nothing'}"
        return Poll("failed", told, failure=Failure("HubError", why, "look at its log, then resume"), handle=handle)

    def cancel(self, task: Task, handle: str) -> None:
        namespace, job, _ = _parts(handle)
        with suppress(HfHubHTTPError):  # it has ended
            HfApi(token=task.token).cancel_job(job_id=job, namespace=namespace)


def _parts(handle: str) -> tuple[str, str, int]:
    name, _, read = handle.partition("#")
    namespace, _, job = name.partition("/")
    return namespace, job, int(read or 0)


def _event(line: str) -> Mapping[str, Any]:
    """A line of a Job's log: an event if it was meant as one, text otherwise."""
    if line.startswith(MARK):
        with suppress(ValueError):
            found = json.loads(line.removeprefix(MARK))
            if isinstance(found, dict) and isinstance(found.get("event"), str):
                return found
    return {"event": "log", "text": line}


def hardware(token: str | bool | None) -> list[Hardware]:
    """What Jobs can run on, cheapest first.  Raises HubError."""
    factors = {"minute": 60.0, "hour": 1.0, "second": 3600.0}
    found = [
        Hardware(
            name=kind.name,
            label=kind.pretty_name,
            usd_per_hour=kind.unit_cost_usd * factors.get(kind.unit_label, 60.0),
            memory=kind.ram,
            accelerator=f"{kind.accelerator.quantity} x {kind.accelerator.model}" if kind.accelerator else None,
        )
        for kind in patiently(lambda: HfApi(token=token).list_jobs_hardware())
    ]
    return sorted(found, key=lambda kind: kind.usd_per_hour)


def price(kinds: Sequence[Hardware], name: str | None, seconds: float, most: float) -> tuple[float, float]:
    """(US dollars that so many seconds cost at most, seconds that `most` dollars buy).

    Raises RequestError for hardware that there is not, LimitError where `most` buys next to nothing.
    """
    kind = next((kind for kind in kinds if kind.name == (name or "cpu-basic")), None)
    if kind is None:
        raise RequestError(f"there is no hardware `{name}`", f"choose one of {', '.join(k.name for k in kinds)}")
    bought = most / kind.usd_per_hour * 3600 if kind.usd_per_hour else math.inf
    if bought < FIRST_MINUTES + 60:
        raise LimitError(f"{most:.2f} USD buy {bought / 60:.0f} minutes of `{kind.name}`", "allow more with `max_usd`")
    allowed = min(seconds, bought - FIRST_MINUTES)
    return (allowed + FIRST_MINUTES) / 3600 * kind.usd_per_hour, allowed
