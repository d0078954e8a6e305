"""The generated kernels against the definition in float64: widths, groups, shapes, types, numbers of rows."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hfquant.runtime import kernels
from hfquant.runtime.kernels import cpu_exact
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.activations import fake_quantize
from hfquant.tensors.encoding import Activations, Encoding
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized
from tests.encoded import encode

from ..rounding import random, rounded

layout = pytest.importorskip("hfquant.runtime.llvm.layout", reason="needs llvmlite")
machine = pytest.importorskip("hfquant.llvm.machine")
pytestmark = pytest.mark.skipif(machine.level() is None, reason="needs AVX2")

SHAPES = ((48, 192), (50, 576), (17, 101), (1, 7))
GROUPS = (64, 128, -1, 48, 32, 30, 100)
ROWS = (1, 2, 3, 5, 17, 64, 257)


def layer_of(Q: Quantized, bias: bool = False, dtype: torch.dtype = torch.float32) -> QLinear:
    b = torch.linspace(-1, 1, Q.shape[0]) if bias else None
    return QLinear.from_quantized(Q, b, formats.load("native"), dtype)


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x[:, columns // 3] *= 8  # an outlier
    return (x + 0.3).to(dtype)


def seen(x: Tensor, grid: Grid) -> Tensor:
    """x as the integer kernel reads it, float64."""
    size = layout.input_group(x.shape[1], grid.columns(x.shape[1]))
    return fake_quantize(x.float(), Activations(8, "group", size)).double()


def compare(Q: Quantized, x: Tensor, kernel: str, bias: bool = False) -> None:
    """One layer, one kernel, one input: the same up to the rounding of sums in float32, and of y to its type."""
    layer = layer_of(Q, bias, x.dtype)
    with kernels.mode(kernel):
        assert kernels.choose(x, layer.matrix).kernel.name == kernel, kernels.choose(x, layer.matrix)
        y = layer(x)
    W = Q.dequantize().double()
    x = seen(x, Q.grid) if kernel == "cpu_int8" else x.double()
    exact = x @ W.T
    # the codes' offset cancels: what is summed may be larger than the result
    size = x.abs() @ (W.abs() + Q.grid.expand(Q.scale.double().abs() * Q.grid.top, W.shape[1])).T
    if bias:
        exact = exact + layer.bias.double()
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[y.dtype]
    assert y.dtype == layer.dtype
    assert ((y.double() - exact).abs() <= 2.0**-22 * size + unit * exact.abs() + 1e-7).all()


def cases() -> list[tuple[int, bool, int, tuple[int, int], int, str]]:
    """Every width with everything else, but not everything with everything."""
    kinds = itertools.cycle(("float32", "bfloat16", "float16"))
    found = []
    for bits, symmetric in itertools.product(range(2, 9), (True, False)):
        for i, group in enumerate(GROUPS):
            shape = SHAPES[(i + bits) % len(SHAPES)]
            found.append((bits, symmetric, group, shape, ROWS[(i + bits + symmetric) % len(ROWS)], next(kinds)))
    return found


@pytest.mark.parametrize(("bits", "symmetric", "group", "shape", "rows", "dtype"), cases())
def test_rounded_on_the_way_in(
    bits: int, symmetric: bool, group: int, shape: tuple[int, int], rows: int, dtype: str
) -> None:
    Q = random(*shape, Grid(bits, group, symmetric))
    compare(Q, inputs(rows, shape[1], getattr(torch, dtype)), "cpu_int8", bias=bits % 2 == 0)


@pytest.mark.parametrize(("bits", "symmetric", "group", "shape", "rows", "dtype"), cases())
def test_as_it_is(bits: int, symmetric: bool, group: int, shape: tuple[int, int], rows: int, dtype: str) -> None:
    Q = random(*shape, Grid(bits, group, symmetric))
    compare(Q, inputs(min(rows, 16), shape[1], getattr(torch, dtype)), "cpu_exact", bias=bits % 2 == 0)


@pytest.mark.parametrize("kernel", ["cpu_int8", "cpu_exact"])
@pytest.mark.parametrize(("bits", "shape"), [(4, (48, 192)), (5, (31, 101)), (8, (17, 576))])
def test_every_number_of_rows(bits: int, shape: tuple[int, int], kernel: str) -> None:
    """1 to 257, to the last bit what each row gives alone; the exact kernel as far as it goes."""
    layer, x = layer_of(random(*shape, Grid(bits, 64, bits != 5)), bias=True), inputs(257, shape[1])
    with kernels.mode(kernel):
        alone = torch.cat([layer(row[None]) for row in x])
        for rows in range(1, 258 if kernel == "cpu_int8" else cpu_exact.MOST + 1):
            assert kernels.choose(x[:rows], layer.matrix).kernel.name == kernel
            assert torch.equal(layer(x[:rows]), alone[:rows])
    compare(random(*shape, Grid(bits, 64, bits != 5)), x[: cpu_exact.MOST], kernel, bias=True)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_everything_with_everything(bits: int, symmetric: bool) -> None:
    for group, shape, dtype in itertools.product(
        GROUPS, (*SHAPES, (576, 576), (193, 1536)), (torch.float32, torch.bfloat16, torch.float16)
    ):
        Q = random(*shape, Grid(bits, group, symmetric))
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 31, 64, 100, 257):
            compare(Q, inputs(rows, shape[1], dtype), "cpu_int8", bias=rows % 2 == 0)
            if rows <= 16:
                compare(Q, inputs(rows, shape[1], dtype), "cpu_exact", bias=rows % 2 == 0)


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["cpu_int8", "cpu_exact"])
def test_scales_of_every_type(kernel: str, scale: torch.dtype) -> None:
    Q = random(48, 192, Grid(4, 64))
    compare(replace(Q, scale=Q.scale.to(scale)), inputs(5, 192), kernel)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_exact(bits: int, symmetric: bool) -> None:
    """Scales of 1 and whole inputs: y is whole too, and right to the last digit; the largest codes among them."""
    draw = torch.Generator().manual_seed(bits)
    grid = Grid(bits, 64, symmetric)
    codes = torch.randint(0, 2**bits, (33, 320), generator=draw).to(torch.uint8)
    codes[0], codes[1] = grid.top, 0
    zero = torch.full((33, 5), grid.middle) if symmetric else torch.randint(0, 2**bits, (33, 5), generator=draw)
    ones = torch.ones(33, 5, dtype=torch.float16)
    Q = Quantized(codes=codes, scale=ones, zero_point=zero.to(torch.uint8), grid=grid)
    x = torch.randint(-127, 128, (9, 320), generator=draw).float()
    x[:, ::64] = 127  # so that the scale of every group of x is 1
    x[0], x[1] = 127, -127
    with kernels.mode("cpu_int8"):
        y = layer_of(Q)(x)
    W = codes.long() - zero.repeat_interleave(64, 1)
    assert torch.equal(y.long(), x.long() @ W.T)
    assert torch.equal(y, y.round())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Decoding one token gives what prefilling gave, bit for bit."""
    for kernel in ("cpu_int8", "cpu_exact"):
        layer, x = layer_of(random(50, 576, Grid(4, 64, False)), bias=True), inputs(15, 576)
        with kernels.mode(kernel):
            together = layer(x)
            assert torch.equal(torch.cat([layer(row[None]) for row in x]), together)


@pytest.mark.parametrize("kernel", ["cpu_int8", "cpu_exact"])
@pytest.mark.parametrize(
    "text", ["w4g64-r4", "w3g50-r17", "w4g32-s", "w5g64sym-2of4", "w8-4of8-r2-s", "w4g64-kept3000"]
)
def test_all_that_a_layer_may_have(text: str, kernel: str) -> None:
    W = torch.randn(50, 192, generator=torch.Generator().manual_seed(3)) * 0.1
    Q = encode(W, Encoding.parse(text))
    layer, x = layer_of(Q, bias=True), inputs(3, 192)
    with kernels.mode("reference"):
        expected = layer(x)
    with kernels.mode(kernel):
        y = layer(x)
        assert kernels.choose(x, layer.matrix).kernel.name == kernel
    close = 1e-5 if kernel == "cpu_exact" else 1.5e-2
    assert (y - expected).norm() <= close * expected.norm()


def test_the_error_of_rounding_inputs_is_what_the_documentation_says() -> None:
    x, errors = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)), []
    for bits in (2, 4, 8):
        Q = rounded(torch.randn(256, 1024, generator=torch.Generator().manual_seed(1)), Grid(bits, 64))
        exact = x.double() @ Q.dequantize().double().T
        with kernels.mode("cpu_int8"):
            errors.append(float((layer_of(Q)(x) - exact).norm() / exact.norm()))
    assert all(0.004 < error < 0.0065 for error in errors), errors
