"""Layers that hold more than a grid compute what their parts say, in whatever way they compute it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfquant.runtime import cache, integers, kernels
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.activations import dynamic_scale, fake_quantize, quantize
from hfquant.tensors.encoding import Activations, Encoding
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized
from tests.encoded import encode

INPUTS = ("token", "tokenasym", "tensor", "tensorasym", "static", "staticasym", "g32", "g48", "g48asym")
GRIDS = ("w8sym", "w8", "w8g64sym", "w8g48", "w4g32sym", "w4sym", "w4g64", "w3g50", "w2g32", "w5g32")
OTHERS = (
    "w16sym-2of4", "w16sym-kept3000", "w4g32sym-2of4", "w4g64-kept3000", "w8-4of8", "w3g50-r4", "w16sym-r3", "w4g32-s",
    "w16sym-s",
)  # fmt: skip


def weight(shape: tuple[int, int] = (48, 192), seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def inputs(rows: int, columns: int = 192) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x[:, 3] *= 8
    return x + 0.3


def layer_of(
    text: str, bias: bool = True, dtype: torch.dtype = torch.float32, fmt: str = "native"
) -> tuple[QLinear, Quantized]:
    Q = encode(weight(), Encoding.parse(text))
    return QLinear.from_quantized(Q, torch.linspace(-1, 1, 48) if bias else None, formats.load(fmt), dtype), Q


def expected(x: Tensor, Q: Quantized, bias: Tensor | None) -> Tensor:
    """By definition, in float64: round what the layer reads, multiply, and multiply by nothing else."""
    x = x.float()
    if Q.input_scale is not None:
        x = x / Q.input_scale
    if Q.activations is not None:
        x = fake_quantize(x, Q.activations, Q.activation_scale, Q.activation_zero)
    W = Q.grid.decode(Q.codes, Q.scale, Q.zero_point).double()
    if Q.mask is not None:
        W = W * Q.mask
    if Q.low_rank is not None:
        W = W + (Q.low_rank.u.double() * Q.low_rank.scale.double()) @ Q.low_rank.v.double()
    return F.linear(x.double(), W, None if bias is None else bias.double())


@pytest.mark.parametrize("extra", ["", "-r4", "-s", "-kept3000", "-2of4-r4-{}-s"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("grid", [*GRIDS, "w16sym"])
def test_rounded_inputs(grid: str, kind: str, extra: str) -> None:
    parts = extra if "{}" in extra else f"-{{}}{extra}" if extra == "-s" else f"{extra}-{{}}"
    layer, Q = layer_of(grid + parts.format(f"a8{kind}"))
    for rows in (1, 3, 20):
        x = inputs(rows)
        torch.testing.assert_close(layer(x).double(), expected(x, Q, layer.bias), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_narrower_inputs(bits: int, symmetric: bool) -> None:
    layer, Q = layer_of(f"w4g32-a{bits}token{'' if symmetric else 'asym'}")
    x = inputs(5)
    torch.testing.assert_close(layer(x).double(), expected(x, Q, layer.bias), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("text", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_rounded_inputs(text: str, dtype: torch.dtype) -> None:
    layer, Q = layer_of(text, dtype=dtype)
    for rows in (1, 3, 80):
        x = inputs(rows).to(dtype)
        y, exact = layer(x), expected(x, Q, layer.bias)
        assert y.dtype == dtype
        close = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}[dtype]
        assert (y.double() - exact).norm() <= close * exact.norm()


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_fast_path_is_the_reference_bit_for_bit(grid: str, kind: str) -> None:
    layer, _ = layer_of(f"{grid}-2of4-r4-a8{kind}")
    x = inputs(7)
    with kernels.mode("int_mm"):
        fast = layer(x)
    with kernels.mode("reference"):
        assert torch.equal(layer(x), fast)


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize(("rows", "n", "out"), [(1, 192, 48), (3, 33, 5), (17, 1025, 7), (5, 4096, 64), (2, 1, 1)])
def test_products_are_exact_integers(rows: int, n: int, out: int, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every product is the largest there is, and without the processor's instructions for it."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    draw = torch.Generator().manual_seed(0)
    q, codes = (torch.randint(-128, 128, (r, n), generator=draw).to(torch.int8) for r in (rows, out))
    q[0], codes[0] = -128, -128
    found = integers.fast(q, codes)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), q.long() @ codes.long().T)


def test_asymmetric_sums_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row longer than what an int32 can add up at worst is added up in pieces."""
    assert integers.MOST * 255 * 255 < 2**31
    assert integers.spans(96, 96, 32) == [(0, 32), (32, 64), (64, 96)]
    assert integers.spans(100, 48, 32) == [(0, 32), (32, 48), (48, 64), (64, 96), (96, 100)]
    monkeypatch.setattr(integers, "MOST", 40)
    assert integers.spans(96, 96) == [(0, 40), (40, 80), (80, 96)]
    layer, Q = layer_of("w8-a8tokenasym")
    x = inputs(3)
    torch.testing.assert_close(layer(x).double(), expected(x, Q, layer.bias), rtol=2e-6, atol=2e-6)


def test_integers_by_hand() -> None:
    """One row, one token, numbers small enough to follow: 0.5·2·((3−2)·(1−4) + (0−2)·(5−4)) = −5."""
    Q = Quantized(
        codes=torch.tensor([[3, 0]], dtype=torch.uint8),
        scale=torch.tensor([[0.5]], dtype=torch.float16),
        zero_point=torch.tensor([[2]], dtype=torch.uint8),
        grid=Grid(2, -1, False),
        activations=Activations(8, "static", -1, False),
        activation_scale=torch.tensor([2.0]),
        activation_zero=torch.tensor([4.0]),
    )
    layer = QLinear.from_quantized(Q, None, formats.load("native"), torch.float32)
    assert layer(torch.tensor([[-6.0, 2.0]])).tolist() == [[-5.0]]


@pytest.mark.parametrize("inputs_kind", ["a8token", "a8static", "a8tokenasym", "a8staticasym", "a8g32"])
@pytest.mark.parametrize("grid", ["w8sym", "w4g32sym"])
def test_compressed_tensors_runs_too(grid: str, inputs_kind: str) -> None:
    layer, Q = layer_of(f"{grid}-{inputs_kind}", fmt="compressed_tensors")
    assert set(dict(layer.named_parameters())) >= {"weight", "weight_scale", "bias"}
    x = inputs(4)
    torch.testing.assert_close(layer(x).double(), expected(x, Q, layer.bias), rtol=2e-6, atol=2e-6)


def test_a_format_that_stores_the_zeros() -> None:
    layer, Q = layer_of("w4g32sym-2of4", fmt="compressed_tensors")
    assert layer.encoding == Encoding(Grid(4, 32))
    assert torch.equal(layer.dequantize(torch.float32), Q.dequantize())


@pytest.mark.parametrize("text", ["w8sym-a8token", "w8sym-r4-a8token-s", "w16sym-a8tensor"])
def test_shapes_types_and_nothing_at_all(text: str) -> None:
    layer, _ = layer_of(text, dtype=torch.bfloat16)
    x = inputs(6).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.view(2, 3, 192)), layer(x).view(2, 3, 48))
    assert layer(x[:0]).shape == (0, 48)
    assert layer(x[0]).shape == (48,)
    assert torch.isfinite(layer(torch.zeros(2, 192))).all()


def test_what_overflowed_stays_visible() -> None:
    """NaN in, NaN out: an integer made of it would hide it."""
    layer, _ = layer_of("w8sym-a8token")
    x = inputs(3)
    x[1, 5] = float("nan")
    assert layer(x).isnan().all(1).tolist() == [False, True, False]


def test_integers_and_sparse_codes_are_made_once_and_follow_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    prepare = integers.prepare
    monkeypatch.setattr(integers, "prepare", lambda *a: made.append(1) or prepare(*a))
    layer, _ = layer_of("w4g64sym-2of4-a8token", bias=False)
    before, x = cache.size(), inputs(2)
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert len(made) == 1
    # a byte per weight, and per row and group an int32 sum and a float32 scale
    assert cache.size() - before == 48 * 192 + 48 * 3 * 8
    with torch.no_grad():
        layer.weight_scale.mul_(2)
    torch.testing.assert_close(layer(x), 2 * first)
    sparse, Q = layer_of("w4g64sym-2of4", bias=False)
    before = cache.size()
    sparse(x)
    assert cache.size() - before == 48 * 192  # a byte per code; the decoded weight is not kept
    assert torch.equal(sparse(x), F.linear(x, Q.dequantize()))


@pytest.mark.parametrize("text", ["w8sym-a8token", "w4g32-2of4-r4-a8staticasym-s", "w16sym-kept3000-r2", "w3g50-a8g32"])
def test_opcheck_and_gradients(text: str) -> None:
    """The gradient is that of the dense layer, as if inputs were not rounded."""
    layer, Q = layer_of(text)
    layer.bias.requires_grad_()
    x, seen = inputs(3).requires_grad_(), torch.randn(3, 48)
    torch.library.opcheck(torch.ops.hfquant.linear, (x, layer.bias, layer.parts, *layer._matrix))
    torch.library.opcheck(torch.ops.hfquant.weight, (layer.parts, *layer._matrix, torch.bfloat16))
    found = torch.autograd.grad(layer(x), (x, layer.bias), seen)
    torch.testing.assert_close(found[0], seen @ Q.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], seen.sum(0))


def test_a_block_of_them_is_one_graph() -> None:
    texts = ("w8sym-a8token", "w4g32sym-2of4-r4-a8static-s", "w16sym-kept3000", "w4g64-r2")
    layers = [encode(weight((192, 192)), Encoding.parse(text)) for text in texts]
    packed = [QLinear.from_quantized(Q, None, formats.load("native"), torch.float32) for Q in layers]
    block = nn.Sequential(*(m for layer in packed for m in (layer, nn.GELU())))
    x = inputs(4)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_dequantize_keeps_all_but_the_rounding_of_inputs() -> None:
    layer, Q = layer_of("w4g32-2of4-r4-a8token-s", bias=False)
    torch.testing.assert_close(layer.dequantize(torch.float32), Q.dequantize(), rtol=1e-5, atol=1e-6)
    x = inputs(50)
    error = (layer(x) - F.linear(x, layer.dequantize(torch.float32))).norm() / layer(x).norm()
    assert 0 < error < 0.05


def test_codes_of_the_input_are_whole_and_within_bounds() -> None:
    """What the products are fed, on inputs beyond a static scale's reach."""
    activations = Activations(8, "static")
    codes = quantize(inputs(9) * 10, activations, torch.tensor([0.01]), torch.zeros(1))
    assert codes.dtype == torch.int8
    assert (int(codes.min()), int(codes.max())) == (-127, 127)
    scale, _ = dynamic_scale(inputs(9), Activations(8, "token"))
    assert scale.shape == (9, 1)
