"""A compressed and measured model, made once; each test gets a copy of its own."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from hfquant.compress import compress
from hfquant.conversion import retry
from hfquant.measure.verify import verify


@pytest.fixture(scope="session")
def made(built: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made("rtn-w4g32", "llama") -> folder of that compression."""

    @cache
    def make(recipe: str, family: str = "llama") -> Path:
        out = tmp_path_factory.mktemp("made") / f"{family}-{recipe}"
        for _ in compress(built(family), recipe, out):
            pass
        verify(out, windows=2, window_len=32, new_tokens=2, enforce=False)
        return out

    return make


@pytest.fixture
def folder(made: Callable[..., Path], tmp_path: Path) -> Path:
    """A 4 bit model in compressed-tensors."""
    shutil.copytree(made("rtn-w4g32"), tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits; how long they would have."""
    found: list[float] = []
    monkeypatch.setattr(retry, "sleep", found.append)
    return found
