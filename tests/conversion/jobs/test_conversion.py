"""A conversion from the Hub to the Hub."""

import resource
from collections.abc import Callable

from .conftest import Desk, weights


def test_from_the_hub_to_the_hub(desk: Desk, calm: Callable[[str], dict[str, str]]) -> None:
    a = resource.getrusage(resource.RUSAGE_SELF)
    job = desk.submit()
    assert desk.job(job).state == "queued"
    w = desk.work()
    done = desk.ended(job)
    assert done.failure is None
    assert done.state == "done"
    assert weights(desk.arrived("alice/small")) == calm("rtn")
    w.kill(15)
    w.wait()
    b = resource.getrusage(resource.RUSAGE_SELF)
    c = resource.getrusage(resource.RUSAGE_CHILDREN)
    print("self", b.ru_utime - a.ru_utime, "children", c.ru_utime, c.ru_stime)
    for s in done.steps:
        print(s)
