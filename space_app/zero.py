"""ZeroGPU: there the Hub lends a Space a GPU for the seconds of one call, and ends Spaces that have no use for one.

What is lent the GPU runs in a process forked from this one, which holds what unlocks everybody's tokens, and which may
stay for the next visitor's call.  So it is given numbers, and is our own arithmetic on them; whole conversions, which
run a model, are not done there.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from .forks import spare

P = ParamSpec("P")
R = TypeVar("R")

SECONDS = 30  # that a call may have the GPU; visitors have minutes of it in a day


def here(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a Space on ZeroGPU."""
    return environment.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def lent(work: Callable[P, R]) -> Callable[P, R]:
    """`work` with a GPU while it runs, on ZeroGPU; elsewhere as it is."""
    if not here():
        return work
    spare()  # of a child that waits for ever, while the visitor's seconds of the GPU pass
    made: Callable[P, R] = importlib.import_module("spaces").GPU(duration=SECONDS)(work)
    return made


def report() -> None:
    """Tell the Hub what was lent a GPU, as gradio's own server does when it begins; ours is another one."""
    if here():
        importlib.import_module("spaces.zero").startup()
