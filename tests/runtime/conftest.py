"""What tests of the run time share."""

from collections.abc import Iterator

import pytest

from hfquant.runtime import kernels


@pytest.fixture
def fastest() -> Iterator[None]:
    """Kernels as a user has them: the fastest that fits."""
    with kernels.mode("auto"):
        yield
