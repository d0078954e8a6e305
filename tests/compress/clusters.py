"""A Ray cluster of this machine: nodes are processes of their own, with their own object store, and can be killed.

On a busy machine a node needs minutes to begin; Ray gives it less, in places that cannot be set, and then it dies or is
given up (ray-project/ray#65983).  Here it is waited for.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SETTINGS = {
    "RAY_worker_niceness": "0",  # as everybody else: on a busy machine 15 means never
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_MEMORY_MONITOR": "1",
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
}
os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
STORE = 300_000_000  # bytes of a node's object store
PATIENCE = 300.0  # seconds that a node may take to begin
AGENTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


@contextmanager
def cluster(nodes: int, cpus: int = 1, *, connect: bool = True) -> Iterator[Any]:
    """A head node, and others, with so many cores each.  connect: this process, which then cannot be forked."""
    import ray
    from ray._private import services
    from ray.cluster_utils import Cluster

    made = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "get_node", patient(services.get_node))
        patch.setattr(services, "start_raylet", without_agents(services.start_raylet))
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
    """`get_node`, which says that a node is not there yet, answering when it is: Ray asks for 30 seconds."""

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


def without_agents(start_raylet: Callable[..., Any]) -> Callable[..., Any]:
    """`start_raylet`, told before that agents for metrics and the dashboard listen nowhere.

    Otherwise the node waits 15 seconds for them to say so, and dies if they are not imported until then.
    """
    from ray._raylet import persist_port

    def start(redis: Any, gcs: str, node: str, *rest: Any, **given: Any) -> Any:
        session = rest[8]
        for agent in AGENTS:
            persist_port(session, node, agent, -1)
        return start_raylet(redis, gcs, node, *rest, **given)

    return start


def node(cpus: int) -> dict[str, Any]:
    """How one is begun.  It is told where its last agent is to listen, or it would wait for that too."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return {
        "num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False, "runtime_env_agent_port": port,
    }  # fmt: skip
