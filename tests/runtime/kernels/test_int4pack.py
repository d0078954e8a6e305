"""The 4-bit kernel: when it runs, what it keeps, and that nothing it keeps can be stale."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from hfquant.runtime import cache, kernels
from hfquant.runtime.kernels import int4pack
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid

from ..rounding import bound, random

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the kernel needs AVX2"
)


@pytest.fixture(autouse=True)
def only_this_kernel() -> Iterator[None]:
    with kernels.mode("int4pack"):
        yield


def layer_of(grid: Grid, seed: int = 0, out_features: int = 48, in_features: int = 96) -> QLinear:
    Q = random(out_features, in_features, grid, seed)
    return QLinear.from_quantized(Q, None, formats.load("native"), torch.bfloat16)


@pytest.mark.parametrize("bits", range(2, 9))
def test_kernel_groups_cover_every_row(bits: int) -> None:
    """Shapes chosen to need each kind of padding: rows, whole rows, last groups, every group."""
    for in_features, group_size, expected in (
        (256, -1, 256),
        (576, 128, 64),  # 128 does not divide 576, 64 divides both
        (576, 48, 64),  # every group padded from 48
        (100, 64, 32),  # the last group is shorter
        (100, -1, 32),  # one group, 28 columns of padding
        (7, -1, 32),
        (100, 30, 32),
    ):
        layer = layer_of(Grid(bits, group_size, False), out_features=17, in_features=in_features)
        group, _, _ = int4pack.kernel_groups(layer.grid, in_features)
        assert group == expected
        x = torch.randn(3, in_features).bfloat16()
        y = int4pack.KERNEL.linear(x, layer.matrix, None)
        exact = x.double() @ layer.quantized().dequantize().double().T
        assert ((y - exact).abs() <= bound(x, layer.quantized(), y)).all()
        assert not torch.equal(y.double(), exact)  # the bound was of something


def test_converting_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 16, (200, 64), dtype=torch.uint8)
    whole = int4pack._convert(codes)
    monkeypatch.setattr(int4pack, "CHUNK", 1)
    assert torch.equal(int4pack._convert(codes), whole)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(Grid(4, 32))
    x = torch.randn(1, 96).bfloat16()

    def reason(x: torch.Tensor, layer: QLinear = layer) -> str | None:
        return int4pack.KERNEL.refuses(x, layer.matrix)

    assert reason(x) is None
    assert reason(x.float()) is None
    assert "64 bits" in str(reason(x.double()))
    assert "1000 rows" in str(reason(x.expand(1000, -1)))
    assert "meta" in str(reason(x.to("meta")))
    with torch.inference_mode():
        made = layer_of(Grid(4, 32))
    assert "inference_mode" in str(reason(x, made))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "no vectorised 4-bit kernel" in str(reason(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_are_rounded_to_bfloat16(dtype: torch.dtype) -> None:
    layer, x = layer_of(Grid(8, 32)), torch.randn(1, 96).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = x.double() @ layer.quantized().dequantize().double().T
    assert ((y - exact).abs() <= bound(x, layer.quantized(), y)).all()
    assert torch.equal(y, layer(x.bfloat16()).to(dtype))


def changed(layer: QLinear, other: QLinear, how: str) -> QLinear:
    """`layer` made to hold the components of `other`."""
    if how == "load_state_dict":
        layer.load_state_dict(other.state_dict())
    elif how == "assign":
        layer.load_state_dict(other.state_dict(), assign=True)
    elif how == "data":
        for mine, theirs in zip(layer.parts, other.parts, strict=True):
            mine.data = theirs.data.clone()
    elif how == "copy_":
        with torch.no_grad():
            for mine, theirs in zip(layer.parts, other.parts, strict=True):
                mine.copy_(theirs)
    elif how == "scale only":
        with torch.no_grad():
            layer.weight_scale.copy_(other.weight_scale)
            other.weight.copy_(layer.weight)
            other.weight_zero_point.copy_(layer.weight_zero_point)
    elif how == "parameter":
        for name in layer.components:
            setattr(layer, name, nn.Parameter(getattr(other, name).clone(), requires_grad=False))
    elif how == "inference mode":
        with torch.inference_mode():
            for mine, theirs in zip(layer.parts, other.parts, strict=True):
                mine.copy_(theirs)
    return layer


HOW = ("load_state_dict", "assign", "data", "copy_", "scale only", "parameter", "inference mode")


@pytest.mark.parametrize("how", HOW)
def test_the_cache_is_never_stale(how: str) -> None:
    layer, other = layer_of(Grid(4, 32, False), seed=1), layer_of(Grid(4, 32, False), seed=2)
    x = torch.randn(1, 96).bfloat16()
    before = layer(x)
    layer = changed(layer, other, how)
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), before)


def test_an_address_that_comes_back_is_not_taken_for_the_old_weight() -> None:
    """A storage is freed and another one allocated in its place, with the same version: the cache must notice."""
    x = torch.randn(1, 96).bfloat16()
    for seed in range(20):
        layer = layer_of(Grid(4, 32, False), seed)
        exact = x.double() @ layer.quantized().dequantize().double().T
        y = layer(x)
        assert ((y - exact).abs() <= bound(x, layer.quantized(), y)).all()
        del layer


def test_packs_are_made_once_and_die_with_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    prepare = int4pack.prepare
    monkeypatch.setattr(int4pack, "prepare", lambda Q: calls.append(1) or prepare(Q))
    gc.collect()
    before, x = cache.size(), torch.randn(1, 96).bfloat16()
    layer = layer_of(Grid(8, 32))
    assert cache.size() == before  # nothing before the first call
    for _ in range(3):
        layer(x)
    assert len(calls) == 1
    # two halves of 4 bits, and a scale and an offset in bfloat16 per group of 32 in each
    assert cache.size() - before == 48 * 96 * 2 // 2 + 48 * 3 * 2 * 4
    layer.to(torch.float32)
    assert cache.size() == before
    layer(x)
    assert len(calls) == 2
    del layer
    gc.collect()
    assert cache.size() == before
