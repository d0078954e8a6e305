"""What no test may lean on: memory that happens to be zero, and random numbers that happen to be kind.

A tolerance that is missed by one draw in a hundred fails on the day it is in the way; the same draws fail at once or
never.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

FUNCTIONS = ("empty", "empty_like", "empty_strided", "empty_permuted")
METHODS = ("new_empty", "new_empty_strided")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Fixtures draw the same numbers in every run."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """So does the test itself, whether fixtures that it shares with others have drawn before it or not."""
    _seed()


def _seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin return NaN or the largest integer: a cell nobody wrote fails its test."""
    for owner, names in ((torch, FUNCTIONS), (torch.Tensor, METHODS)):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.is_meta or tensor.dtype == torch.bool:
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    return made
