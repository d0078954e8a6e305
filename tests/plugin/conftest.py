from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.families import build


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The dense checkpoint of a family, made once."""
    folder = tmp_path_factory.mktemp("dense")

    def get(family: str, dtype: torch.dtype = torch.float32) -> Path:
        path = folder / f"{family}-{str(dtype)[6:]}"
        return path if path.exists() else build(family, path, dtype=dtype)

    return get
