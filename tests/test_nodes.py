"""Connecting to other machines: once, and with words for what is not there."""

import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from hfquant.errors import ResourceError
from hfquant.nodes import connected


class Ray(SimpleNamespace):
    """Slow to connect, and refuses to do it twice."""

    begun = 0
    ready = False

    def is_initialized(self) -> bool:
        return self.ready

    def init(self, **given: Any) -> None:
        self.begun += 1
        assert self.begun == 1, "Perhaps you called ray.init twice by accident?"
        time.sleep(0.05)
        self.ready = True


def test_several_threads_connect_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray, found = Ray(), list[Any]()
    monkeypatch.setitem(sys.modules, "ray", ray)
    threads = [threading.Thread(target=lambda: found.append(connected("auto"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [ray] * 4
    assert ray.begun == 1


def test_a_node_that_does_not_begin_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["The current node timed out during startup. This could happen because", "something else"]

    def init(**given: Any) -> None:
        raise Exception(said[0])

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(ResourceError, match="did not begin in time"):
        connected("local")
    del said[0]
    with pytest.raises(Exception, match="something else") as error:
        connected("local")
    assert not isinstance(error.value, ResourceError)


def test_no_cluster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**given: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(
        ResourceError, match="no Ray cluster at `auto`: Could not find any running Ray instance"
    ) as error:
        connected("auto")
    assert "ray start --head" in str(error.value)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ResourceError, match="needs the package `ray`"):
        connected("auto")
