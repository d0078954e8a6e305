"""A Ray cluster of this machine: nodes are processes of their own, with their own object store, and can be killed."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")  # as everybody else: on a busy machine 15 means never
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DISABLE_MEMORY_MONITOR", "1")
STORE = 300_000_000  # bytes of a node's object store
TRIES = 6


@contextmanager
def cluster(nodes: int, cpus: int = 1, *, connect: bool = True) -> Iterator[Any]:
    """A head node, and others, with so many cores each.  connect: this process, which then cannot be forked."""
    import ray

    made = begun(nodes, cpus)
    try:
        if connect:
            ray.init(address=made.address, logging_level=logging.ERROR, log_to_driver=False)
            made.wait_for_nodes(timeout=300)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def begun(nodes: int, cpus: int) -> Any:
    """Ray gives a node half a minute to begin, which on a busy machine is not enough: then it is tried again."""
    from ray.cluster_utils import Cluster

    for left in reversed(range(TRIES)):
        made = Cluster()
        try:
            for _ in range(nodes):
                made.add_node(**node(cpus))
        except Exception as error:  # Ray has no class for it
            made.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise
        else:
            return made


def node(cpus: int) -> dict[str, Any]:
    return {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
