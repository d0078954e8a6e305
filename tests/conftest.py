"""What every test runs under: no network, no progress bars, one thread, no memory that happens to be zero, and exact
kernels unless it says otherwise."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # scipy's own threads spin: four times the work for matrices this small

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

from tests import families

pytest_plugins = ["tests.hub.fixtures", "tests.poison"]

transformers.utils.logging.disable_progress_bar()
# Models of a megabyte lose more to waiting for a second thread than it brings; on a busy machine, tenfold.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers compute what their weights say, so that results can be compared; kernels that round are tested as such."""
    monkeypatch.setenv("HFQUANT_KERNELS", "exact")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """trained("gpt2") -> folder of the small model of that family, trained once and only if asked for."""
    return cache(lambda family: families.train(family, tmp_path_factory.mktemp("trained") / family))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """built("gpt2") -> folder of the small model of that family with random weights."""
    return cache(lambda family: families.build(family, tmp_path_factory.mktemp("built") / family))


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """uneven("gpt2") -> folder of the small random model of that family with norms and biases that differ."""
    return cache(lambda family: families.build_uneven(family, tmp_path_factory.mktemp("uneven") / family))
