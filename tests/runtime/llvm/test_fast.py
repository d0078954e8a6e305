"""Unpacking and decoding in machine code: bit for bit what torch makes of the same words."""

import pytest
import torch

pytest.importorskip("llvmlite")

from hfquant.llvm import machine
from hfquant.runtime import kernels
from hfquant.runtime.llvm import fast
from hfquant.runtime.nn import QLinear
from hfquant.runtime.reference import dense
from hfquant.tensors import formats, packing
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.grid import Grid
from tests.encoded import encode

from ..rounding import random

here = machine.level()
pytestmark = pytest.mark.skipif(here is None, reason="needs AVX2")


@pytest.mark.parametrize("bits", range(1, 9))
def test_streams_and_planes(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert here is not None
    monkeypatch.setattr(packing, "faster", None)
    for rows, count in ((1, 1), (3, 7), (5, 31), (2, 32), (4, 33), (7, 101), (3, 576), (1, 64)):
        codes = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8)
        stream, planes = packing.pack_stream(codes, bits), packing.pack_planes(codes, bits)
        assert torch.equal(fast.unpacked(here, stream, (bits,), count), codes)
        assert torch.equal(fast.unpacked(here, planes, packing.planes(bits), count), codes)
        assert torch.equal(packing.unpack_planes(planes, bits, count), codes)


def test_it_steps_in_where_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert here is not None
    monkeypatch.setattr(packing, "faster", None)
    fast.accelerate.cache_clear()
    fast.accelerate(here)
    codes = torch.randint(0, 8, (200, 100), dtype=torch.uint8)
    packed = packing.pack_planes(codes, 3)
    assert packing.faster is not None
    assert packing.faster(packed, (2, 1), 100) is not None
    assert packing.faster(packed[:2], (2, 1), 100) is None
    assert packing.faster(packed.to("meta"), (2, 1), 100) is None
    assert torch.equal(packing.unpack_planes(packed, 3, 100), codes)
    wide = packing.pack_stream(codes.repeat(1, 2), 4)[:, ::2]  # not contiguous
    assert torch.equal(packing.unpack_stream(wide, 4, 100), _slowly(wide, 4, 100, monkeypatch))


def _slowly(words: torch.Tensor, bits: int, n: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as m:
        m.setattr(packing, "faster", None)
        return packing.unpack_stream(words, bits, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 48, 50, 128, -1])
def test_decoding(group: int, symmetric: bool, dtype: torch.dtype) -> None:
    assert here is not None
    for bits in (2, 5, 8):
        Q = random(33, 202, Grid(bits, group, symmetric))
        assert torch.equal(fast.dense(here, Q, dtype), dense(Q, dtype))


@pytest.mark.parametrize("text", ["w4g64", "w3g50sym-2of4-r4-s", "w8-kept3000"])
def test_the_kernel_is_the_reference_bit_for_bit(text: str) -> None:
    Q = encode(torch.randn(48, 200, generator=torch.Generator().manual_seed(0)), Encoding.parse(text))
    layer = QLinear.from_quantized(Q, torch.linspace(-1, 1, 48), formats.load("native"), torch.float32)
    x = torch.randn(20, 200)
    found = {}
    for mode in ("cpu_dense", "reference"):
        with kernels.mode(mode):
            assert kernels.choose(x, layer.matrix).kernel.name == mode
            found[mode] = layer(x)
    assert torch.equal(found["cpu_dense"], found["reference"])
