"""A Ray cluster of this machine: nodes are processes of their own, with their own object store, and can be killed."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # this machine may be busy
os.environ.setdefault("RAY_worker_niceness", "0")  # as everybody else: on a busy machine 15 means never
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DISABLE_MEMORY_MONITOR", "1")
STORE = 300_000_000  # bytes of a node's object store


@contextmanager
def cluster(nodes: int, cpus: int = 1) -> Iterator[Any]:
    """A head node, and others, with so many cores each; Ray is connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=node(cpus))
    try:
        for _ in range(nodes - 1):
            made.add_node(**node(cpus))
        ray.init(address=made.address, logging_level=logging.ERROR, log_to_driver=False)
        made.wait_for_nodes(timeout=300)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def node(cpus: int) -> dict[str, Any]:
    return {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
