"""What is said where the kernels for GPUs do not run.  Nothing here needs triton."""

from collections.abc import Iterator

import pytest
import torch

from hfquant.runtime import kernels
from hfquant.runtime.kernels import triton
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid

from ...rounding import random

NAMES = "gpu_exact,gpu_rounded"


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers are remembered: not those of this test."""
    monkeypatch.setattr(kernels, "_EXPLAINED", set())
    found = triton.refuses_device, triton.refuses_triton
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as torch says."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(triton, "refuses_triton", lambda: None)


def test_an_explanation_names_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HFQUANT_EXPLAIN", "1")
    layer = QLinear.from_quantized(random(48, 96, Grid(4, 32)), None, formats.load("native"), torch.bfloat16)
    with kernels.mode(NAMES):
        layer(torch.ones(2, 96, dtype=torch.bfloat16))
    assert capsys.readouterr().err == (
        "hfquant: native w4g32sym 48x96, 2 x bfloat16: reference"
        " (not gpu_exact: for NVIDIA GPUs, not cpu; not gpu_rounded: for NVIDIA GPUs, not cpu)\n"
    )


@pytest.mark.usefixtures("hopper")
def test_a_gpu_that_will_do() -> None:
    assert triton.refuses_device("cuda", 0) is None
    assert triton.refuses_device("xpu", 0) == "for NVIDIA GPUs, not xpu"


@pytest.mark.usefixtures("hopper")
def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert triton.refuses_device("cuda", 0) == "compute capability 7.5: needs 8.0"


@pytest.mark.usefixtures("hopper")
def test_a_gpu_of_another_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton.refuses_device("cuda", 0) == "for NVIDIA GPUs, not AMD's"


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert triton.refuses_device("cuda", 0) == "triton is not installed: `pip install 'hfquant[gpu]'`"


def test_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("triton", reason="the extra `gpu` is not installed")
    monkeypatch.setattr(library, "__version__", "3.5.1+git")
    assert triton.refuses_device("cuda", 0) == "triton 3.5.1+git is too old: needs 3.7"
