"""A process forks while another of its threads uses the Hub's client."""

import sys
import threading
from collections.abc import Callable

import huggingface_hub
from huggingface_hub.utils import _http

from space_app.forks import spare
from tests.conversion.jobs.forks import Forked


def ended(work: Callable[[], int]) -> int:
    """The exit code of a fork that does `work`; it may hang at the fork itself."""
    child = Forked(lambda: sys.exit(work()))
    try:
        return child.wait(20)
    finally:
        if child.code is None:
            child.kill()


def test_a_fork_does_not_wait_for_a_thread_it_lacks() -> None:
    spare()
    client = huggingface_hub.get_session()
    lock = client._transport._pool._optional_thread_lock  # type: ignore[attr-defined]
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(10)
    try:
        assert ended(lambda: int(huggingface_hub.get_session() is client)) == 0
        assert _http._GLOBAL_CLIENT is client, "the forking process keeps its own"
    finally:
        release.set()
        other.join()


def test_many_threads_may_fork_at_once() -> None:
    """The client is there afterwards, and no child is left waiting."""
    spare()
    client = huggingface_hub.get_session()
    codes: list[int] = []

    def fork() -> None:
        for _ in range(10):
            codes.append(ended(lambda: 0))

    threads = [threading.Thread(target=fork) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 40
    assert _http._GLOBAL_CLIENT is client
