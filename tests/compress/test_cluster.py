"""A model compressed by a Ray cluster: as by one process, though a node dies in the middle."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hfquant.compress import compress
from hfquant.compress.crew import Devices
from hfquant.errors import ResourceError
from tests.compress.folders import digests

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")]
CALIBRATION = {"samples": 8, "seq_len": 32}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    from tests.compress.clusters import cluster

    with cluster(2) as made:
        yield made


def failing(device: str, shared: Any, part: int) -> int:
    if part == 1:
        raise ResourceError("one of them fails", "a hint")
    return part


def where(device: str, shared: float, part: int) -> tuple[int, str]:
    import ray

    time.sleep(shared)
    return part, ray.get_runtime_context().get_node_id()


def held(device: str, shared: int, part: int) -> tuple[list[int], int]:
    return [shared + part] * 1_000_000, part


def looked(device: str, shared: Any, kept: list[int]) -> int:
    return kept[0]


def test_jobs_are_done_on_all_nodes_and_errors_come_back(nodes: Any) -> None:
    from hfquant.compress.cluster import Cluster

    crew = Cluster()
    seen: set[str] = set()
    until = time.monotonic() + 300
    while len(seen) < 2 and time.monotonic() < until:  # the second node's worker may have to begin
        done = list(crew.each(where, crew.keep(0.5), ((i,) for i in range(8))))
        assert [part for part, _ in done] == list(range(8))
        seen |= {node for _, node in done}
    assert len(seen) == 2
    with pytest.raises(ResourceError, match="one of them fails") as error:
        list(crew.each(failing, None, ((i,) for i in range(4))))
    assert error.value.hint == "a hint"
    with pytest.raises(ResourceError, match="no node of the Ray cluster has 64 cores"):
        Cluster(threads=64)


@pytest.mark.parametrize(("family", "recipe"), [("llama", "gptq-w4g32"), ("mixtral", "gptq-w8g32")])
def test_the_same_bytes_as_one_process(
    family: str, recipe: str, nodes: Any, built: Callable[[str], Path], tmp_path: Path
) -> None:
    from hfquant.compress.cluster import Cluster

    list(compress(built(family), recipe, tmp_path / "one", crew=Devices(["cpu"]), **CALIBRATION))
    list(compress(built(family), recipe, tmp_path / "two", crew=Cluster(), **CALIBRATION))
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_a_lost_node_costs_its_shards_not_the_run(nodes: Any, built: Callable[[str], Path], tmp_path: Path) -> None:
    """Killed while it works on a block and holds inputs of it: the other makes them again."""
    import ray

    from hfquant.compress.cluster import Cluster

    second = next(iter(nodes.worker_nodes))
    killed = threading.Event()
    seen: set[str] = set()

    def kill() -> None:
        nodes.remove_node(second, allow_graceful=False)
        killed.set()

    run = compress(built("llama"), "gptq-w4g32", tmp_path / "two", crew=Cluster(), **CALIBRATION)
    for layer in run:
        seen.add(layer.name)
        if len(seen) == 9:  # in the second block, with layers of it still to come
            kill()
    assert killed.is_set()
    until = time.monotonic() + 120
    while sum(node["Alive"] for node in ray.nodes()) > 1:  # Ray takes a while to say so
        assert time.monotonic() < until
        time.sleep(0.5)
    list(compress(built("llama"), "gptq-w4g32", tmp_path / "one", crew=Devices(["cpu"]), **CALIBRATION))
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert len(seen) == 21


def test_what_a_lost_node_kept_is_made_again(nodes: Any) -> None:
    from hfquant.compress.cluster import Cluster
    from tests.compress.clusters import node

    third = nodes.add_node(**node(4))
    nodes.wait_for_nodes(timeout=300)
    crew = Cluster(threads=4)  # the new one alone has them
    kept = [handle for handle, _ in crew.each(held, crew.keep(10), ((i,) for i in range(2)), stay=1)]
    nodes.add_node(**node(4))
    nodes.remove_node(third, allow_graceful=False)
    assert list(crew.each(looked, None, ((handle,) for handle in kept))) == [10, 11]
