"""Jobs on a Hub's machines: they are taken down, listed by label, cancelled; their logs are streamed.

What a Job does is the test's affair: it sets `stage` and `lines`, or `Hub.jobs.begun` is called with every new one.
"""

import json
from typing import Any

from .server import Answer, Hub, Job, Request
from .store import DATE, Refused

HARDWARE = [
    ("a10g-small", "Nvidia A10G - small", "15 GB", 0.016667, {"type": "gpu", "model": "A10G", "quantity": "1"}),
    ("cpu-basic", "CPU Basic", "16 GB", 0.000167, None),
]
FINAL = ("COMPLETED", "CANCELED", "ERROR", "DELETED")


def shown(job: Job) -> dict[str, Any]:
    """A Job as the Hub tells of it: secrets by name only."""
    return {
        "id": job.id, "createdAt": DATE, "dockerImage": job.spec.get("dockerImage"),
        "owner": {"id": "0", "name": job.namespace, "type": "user"}, "command": job.spec["command"],
        "environment": job.spec["environment"], "flavor": job.spec["flavor"], "labels": job.spec.get("labels"),
        "secrets": list(job.spec.get("secrets") or {}), "status": {"stage": job.stage, "message": job.message},
    }  # fmt: skip


def route(hub: Hub, request: Request) -> Answer:
    """/api/jobs/..."""
    rest = request.parts[2:]
    if rest == ("hardware",):
        return Answer.of([_hardware(*kind) for kind in HARDWARE])
    namespace = rest[0]
    if not hub.store.may_write(request.user, namespace):
        raise Refused(403, message="You may not see the Jobs of this namespace")
    if len(rest) == 1:
        return _post(hub, request, namespace) if request.method == "POST" else _list(hub, request, namespace)
    found = next((job for job in hub.jobs.all if (job.namespace, job.id) == (namespace, rest[1])), None)
    if found is None:
        raise Refused(404, message="Job not found")
    action = (request.method, *rest[2:])
    if action == ("POST", "cancel"):
        if found.stage in FINAL:
            raise Refused(409, message="The Job has ended")
        found.stage = "CANCELED"
    elif action == ("GET", "logs"):
        events = [{"data": "===== Job started =====", "timestamp": DATE}]
        events += [{"data": line, "timestamp": DATE} for line in found.lines()]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ": keep-alive\n\n"
        return Answer(200, body.encode(), {"Content-Type": "text/event-stream"})
    elif action != ("GET",):
        raise Refused(404, message="no such route")
    return Answer.of(shown(found))


def _post(hub: Hub, request: Request, namespace: str) -> Answer:
    if request.token in hub.store.read_only:
        raise Refused(403, message="This token may not start Jobs")
    made = Job(f"{len(hub.jobs.all):024x}", namespace, request.json())
    hub.jobs.all.append(made)
    hub.jobs.begun(made)
    return Answer.of(shown(made))


def _list(hub: Hub, request: Request, namespace: str) -> Answer:
    wanted = [tuple(label.split("=", 1)) for label in request.queries.get("label", ())]
    stages = request.queries.get("stage", ())
    return Answer.of([
        shown(job)
        for job in hub.jobs.all
        if job.namespace == namespace
        and all((job.spec.get("labels") or {}).get(key) == value for key, value in wanted)
        and (not stages or job.stage in stages)
    ])  # fmt: skip


def _hardware(name: str, label: str, ram: str, usd: float, accelerator: dict[str, str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name, "prettyName": label, "cpu": "2 vCPU", "ram": ram, "unitCostMicroUSD": round(usd * 1e6),
        "unitCostUSD": usd, "unitLabel": "minute",
    }  # fmt: skip
    if accelerator:
        found["accelerator"] = accelerator | {"vram": "24 GB", "manufacturer": "Nvidia"}
    return found
