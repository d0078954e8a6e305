"""A Ray cluster of this machine: nodes are processes of their own, with their own object store, and can be killed."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

os.environ.setdefault("RAY_worker_niceness", "0")  # as everybody else: on a busy machine 15 means never
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DISABLE_MEMORY_MONITOR", "1")
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "300")
STORE = 300_000_000  # bytes of a node's object store
PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
PATIENCE = 300.0  # seconds that a node may take to begin


@contextmanager
def cluster(nodes: int, cpus: int = 1, *, connect: bool = True) -> Iterator[Any]:
    """A head node, and others, with so many cores each.  connect: this process, which then cannot be forked."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray._private.services.get_node", patient(ray._private.services.get_node))
        try:
            for _ in range(nodes):
                made.add_node(**node(cpus))
            if connect:
                ray.init(address=made.address, logging_level=logging.ERROR, log_to_driver=False)
                made.wait_for_nodes(timeout=PATIENCE)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def patient(get_node: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    """`get_node`, which says that a node is not there yet, answering when it is.

    Ray asks it for 30 seconds, which cannot be set, and gives the node up; with other work on all cores, importing
    what a node is made of takes longer than that.
    """

    def wait(address: str, node: str) -> Any:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return get_node(address, node)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    return wait


def node(cpus: int) -> dict[str, Any]:
    """How one is begun.

    A node that is to find ports for its agents itself dies where those need more than 15 seconds to say which they have
    (ray-project/ray#65983): on a busy machine, to be imported.
    """
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    return {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False, **ports}


def free_ports(count: int) -> list[int]:
    """So many that nobody listens at now."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in found]
