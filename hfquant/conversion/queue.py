"""The durable queue, DBOS: which of the planned jobs a worker takes next, and which steps of it are behind.

Its tables hold a job's id and small results of steps, as JSON: never a token, a tensor or a pickle.
"""

import json
from typing import Any

import sqlalchemy as sa
from dbos import DBOSClient, EnqueueOptions, Serializer

from .database import Database, quiet

APP = "hfquant"
QUEUE = "conversions"
WORKFLOW = "convert"
VERSION = "conversion-1"  # of the steps: change it when a half-finished job could not go on with the new ones


class StepError(Exception):
    """What is left of an exception that DBOS wrote down."""


class Json(Serializer):
    """Plain JSON instead of pickles: whoever can write to the database cannot run code in a worker."""

    def serialize(self, data: Any) -> str:
        return json.dumps({"error": str(data)} if isinstance(data, BaseException) else {"value": data})

    def deserialize(self, serialized_data: str) -> Any:
        found = json.loads(serialized_data)
        return StepError(found["error"]) if "error" in found else found["value"]

    def name(self) -> str:
        return "hfquant_json"


class Queue:
    """The queue as seen from outside a worker."""

    def __init__(self, database: Database) -> None:
        quiet()
        self._client = DBOSClient(system_database_url=database.text, serializer=Json(), application_name=APP, lazy=True)

    def configure(self, everybody: int, one: int, poll: float) -> None:
        """How many jobs may run at once, on all workers and on one; poll: seconds between two looks at the queue."""
        self._client.register_queue(
            QUEUE,
            global_concurrency=everybody,
            worker_concurrency=min(one, everybody),
            polling_interval_sec=poll,
            on_conflict="always_update",
        )

    def put(self, connection: sa.Connection, job: str, attempt: int, priority: int) -> None:
        """Queue one attempt of a job, in the transaction that decided so."""
        options: EnqueueOptions = {
            "workflow_name": WORKFLOW,
            "queue_name": QUEUE,
            "workflow_id": workflow_id(job, attempt),
            "app_version": VERSION,
            "priority": priority,
        }
        self._client.enqueue_in_transaction(connection, options, job, attempt)

    def cancel(self, job: str, attempt: int) -> None:
        self._client.cancel_workflow(workflow_id(job, attempt))

    def again(self, job: str, attempt: int) -> None:
        """Queue what nobody works on although it was taken."""
        self._client.resume_workflow(workflow_id(job, attempt), queue_name=QUEUE)

    def states(self, attempts: list[tuple[str, int]]) -> dict[str, tuple[str, str | None, str | None]]:
        """What DBOS says: job -> (status, executor, version), for those attempts that it knows."""
        if not attempts:
            return {}  # DBOS takes an empty list for no condition
        wanted = {workflow_id(*attempt): attempt[0] for attempt in attempts}
        found = self._client.list_workflows(workflow_ids=list(wanted), load_input=False, load_output=False)
        return {wanted[w.workflow_id]: (w.status, w.executor_id, w.app_version) for w in found}

    def executors(self) -> set[str]:
        """The workers that are at something, as far as DBOS knows."""
        found = self._client.list_workflows(status="PENDING", name=WORKFLOW, load_input=False, load_output=False)
        return {w.executor_id for w in found if w.executor_id}

    def forget(self, job: str, attempts: int) -> None:
        """Remove what is written of a job."""
        self._client.delete_workflows([workflow_id(job, attempt) for attempt in range(1, attempts + 1)])

    def close(self) -> None:
        self._client.destroy()


def workflow_id(job: str, attempt: int) -> str:
    return f"{job}.{attempt}"
