"""Who is asked, in which order, what is said about it, and what happens when a kernel or an input is bad."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hfquant.errors import KernelError, ShapeError
from hfquant.runtime import kernels
from hfquant.runtime.nn import QLinear
from hfquant.runtime.reference import Matrix
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid

from ..rounding import random


@dataclass
class Told:
    """A kernel that does as it is told."""

    name: str
    rank: int
    exact: bool = True
    reason: str | None = None
    fails: bool = False
    asked: int = 0

    def refuses(self, x: Tensor, matrix: Matrix) -> str | None:
        self.asked += 1
        return self.reason

    def linear(self, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        if self.fails:
            raise kernels.Unavailable("its compiler is missing")
        return x.new_full((x.shape[0], matrix.shape[0]), self.rank)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Told]]:
    """No kernels but these, and the reference."""
    found = [Told("first", 1, exact=False), Told("second", 2), Told("third", 3)]
    by_name = {kernel.name: kernel for kernel in found} | {"reference": kernels.load("reference")}
    monkeypatch.setattr(kernels, "NAMES", list(by_name))
    monkeypatch.setattr(kernels, "load", by_name.__getitem__)
    monkeypatch.setattr(kernels, "_BROKEN", {})
    monkeypatch.setattr(kernels, "_EXPLAINED", set())
    kernels.allowed.cache_clear()
    with kernels.mode("auto"):
        yield found
    kernels.allowed.cache_clear()


@pytest.fixture
def layer() -> QLinear:
    return QLinear.from_quantized(random(48, 96, Grid(4, 32)), None, formats.load("native"), torch.float32)


def ran(layer: QLinear, rows: int = 1) -> float:
    """The rank of the kernel that ran; the reference gives something else."""
    return float(layer(torch.full((rows, 96), 0.3))[0, 0])


def test_the_first_that_does_not_refuse_runs(three: list[Told], layer: QLinear) -> None:
    first, second, third = three
    assert ran(layer) == 1
    first.reason = second.reason = "it does not want to"
    assert ran(layer) == 1  # it was asked already
    assert ran(layer, 2) == 3
    third.reason = "neither"
    assert ran(layer, 3) not in (1, 2, 3)


def test_kernels_are_asked_once_for_a_number_of_rows(three: list[Told], layer: QLinear) -> None:
    for rows in (1, 1, 64, 64, 65, 100, 127, 128):
        ran(layer, rows)
    assert three[0].asked == 4  # 1, 64, up to 127, up to 255
    layer.weight_scale.data = layer.weight_scale.data.clone()
    ran(layer)
    assert three[0].asked == 5


def test_modes(three: list[Told], layer: QLinear) -> None:
    assert ran(layer) == 1
    with kernels.mode("exact"):
        assert ran(layer) == 2
        with kernels.mode("third,first"):
            assert ran(layer) == 3
        assert ran(layer) == 2
    with kernels.mode("reference"):
        assert ran(layer) not in (1, 2, 3)
    assert ran(layer) == 1


def test_a_kernel_that_does_not_exist(three: list[Told], layer: QLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(KernelError, match=r"there is no kernel `thrid`\n\nhint: did you mean `third`"),
        kernels.mode("thrid"),
    ):
        pass
    monkeypatch.setattr(kernels, "current", lambda: "cuda")  # as HFQUANT_KERNELS may say
    with pytest.raises(KernelError, match="choose from auto, exact, first"):
        layer(torch.ones(1, 96))


def test_a_kernel_that_fails_is_left_out_and_said_so_once(three: list[Told], layer: QLinear) -> None:
    assert ran(layer) == 1
    three[0].fails = True
    with pytest.warns(RuntimeWarning, match="the kernel `first` is not used any more: its compiler is missing"):
        assert ran(layer) == 2
    assert ran(layer) == 2  # warnings are errors here
    other = QLinear.from_quantized(random(16, 96, Grid(3, 32)), None, formats.load("native"), torch.float32)
    assert ran(other) == 2
    assert kernels.choose(torch.ones(1, 96), other.matrix).refused == (("first", "it failed: its compiler is missing"),)


def test_explanations(
    three: list[Told], layer: QLinear, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran(layer)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("HFQUANT_EXPLAIN", "1")
    three[0].reason, three[1].reason = "too late", "too early"
    for _ in range(2):
        ran(layer, 2)
    twin = QLinear.from_quantized(random(48, 96, Grid(4, 32), 1), None, formats.load("native"), torch.float32)
    ran(twin, 2)
    said = capsys.readouterr().err.splitlines()
    assert said == ["hfquant: native w4g32sym 48x96, 2 x float32: third (not first: too late; not second: too early)"]


def test_what_does_not_fit_is_refused_before_any_kernel(layer: QLinear) -> None:
    with pytest.raises(ShapeError, match=r"\[48, 96\] was given torch.float32 \[2, 90\]"):
        layer(torch.ones(2, 90))
    with pytest.raises(ShapeError, match="give it floats"):
        layer(torch.ones(2, 96, dtype=torch.int64))
    with pytest.raises(ShapeError, match="components"):
        torch.ops.hfquant.linear(torch.ones(2, 60), None, layer.parts, "native", "w4g32sym", 48, 60)
    with pytest.raises(ShapeError, match="components"):
        torch.ops.hfquant.linear(torch.ones(2, 96), None, layer.parts, "native", "w4g32sym", 40, 96)


def test_any_strides_and_leading_shapes(layer: QLinear) -> None:
    W = layer.dequantize(torch.float32)
    wide = torch.randn(2, 3, 192)
    for x in (wide[..., ::2], wide[..., :96], wide[0, 0, :96], wide[:, 1, 96:], torch.randn(1, 96).expand(7, 96)):
        torch.testing.assert_close(layer(x), x @ W.T)
    assert layer(wide[:0, :, :96]).shape == (0, 3, 48)
