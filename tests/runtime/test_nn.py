"""Packed layers: their parameters, and that they compute what their codes say."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfquant.errors import FormatError
from hfquant.runtime.nn import QEmbedding, QLinear
from hfquant.runtime.swap import share
from hfquant.tensors import formats
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.grid import Grid

from .rounding import bound, random

GROUPS = (32, 48, 64, 128, -1)
SHAPES = ((64, 96), (40, 100), (32, 576))  # even; nothing divides it; ragged in groups of 128


def grids(fmt: str, bits: int) -> list[tuple[Grid, tuple[int, int]]]:
    """Everything a format can store at a width."""
    every = [(Grid(bits, g, s), shape) for g in GROUPS for s in (True, False) for shape in SHAPES]
    return [(g, shape) for g, shape in every if formats.load(fmt).refuses(Encoding(g), shape, "linear") is None]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("fmt", formats.NAMES)
def test_forward_is_the_dense_layer_of_its_codes(fmt: str, bits: int) -> None:
    """float32, or many rows: exactly F.linear with the decoded weight.  Else: within the kernel's bound."""
    cases = grids(fmt, bits)
    assert cases or bits in (5, 6, 7)
    for grid, (out_features, in_features) in cases:
        Q, bias = random(out_features, in_features, grid), torch.linspace(-1, 1, out_features)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            layer = QLinear.from_quantized(Q, bias if out_features != 64 else None, formats.load(fmt), dtype)
            for rows in (1, 5, 70):
                x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
                y, b = layer(x), layer.bias
                assert y.dtype == dtype
                assert y.shape == (rows, out_features)
                if dtype == torch.float32 or rows == 70:
                    assert torch.equal(y, F.linear(x, Q.dequantize().to(dtype), b)), (grid, dtype, rows)
                else:
                    exact = F.linear(x.double(), Q.dequantize().double(), None if b is None else b.double())
                    assert ((y - exact).abs() <= bound(x, Q, y, b)).all(), (grid, rows)


def test_batched_and_empty_inputs() -> None:
    Q = random(32, 64, Grid(4, 32, False))
    for dtype in (torch.float32, torch.bfloat16):
        layer = QLinear.from_quantized(Q, None, formats.load("native"), dtype)
        x = torch.randn(2, 3, 64).to(dtype)
        torch.testing.assert_close(layer(x), layer(x.view(6, 64)).view(2, 3, 32))
        torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
        assert layer(x[:0]).shape == (0, 3, 32)
        assert layer(x[0, 0]).shape == (32,)


@pytest.mark.parametrize(
    ("fmt", "grid", "names"),
    [
        ("native", Grid(5, 64, True), {"weight", "weight_scale"}),
        ("native", Grid(5, 64, False), {"weight", "weight_scale", "weight_zero_point"}),
        ("compressed_tensors", Grid(4, 64, True), {"weight_packed", "weight_scale", "weight_shape"}),
        ("gptq", Grid(3, 64, False), {"qweight", "qzeros", "scales", "g_idx"}),
    ],
)
def test_parameters_are_the_formats_components(fmt: str, grid: Grid, names: set[str]) -> None:
    layer = QLinear(
        64, 32, True, encoding=Encoding(grid), fmt=formats.load(fmt), scale_dtype=torch.float16, dtype=torch.float32
    )
    params = dict(layer.named_parameters())
    assert set(params) == names | {"bias"}
    assert all(p.is_meta and not p.requires_grad and p._is_hf_initialized for p in params.values())
    spec = formats.load(fmt).spec(Encoding(grid), (32, 64), torch.float16)
    assert {n: (tuple(params[n].shape), params[n].dtype) for n in names} == spec
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (64, 32)


@pytest.mark.parametrize("fmt", formats.NAMES)
def test_state_dict_round_trip(fmt: str) -> None:
    """What was loaded is saved again bit for bit, also after the kernel derived its own copy."""
    grid, x = Grid(4, 32, True), torch.randn(1, 64).bfloat16()
    one, other = (
        QLinear.from_quantized(random(32, 64, grid, seed), torch.full((32,), seed), formats.load(fmt), torch.bfloat16)
        for seed in (1, 2)
    )
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(state)
    assert torch.equal(one(x), other(x))
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_moving_to_a_dtype_leaves_the_components_alone() -> None:
    """A scale rounded to bfloat16 would be another weight, and another checkpoint."""
    Q = random(32, 64, Grid(4, 32, False))
    layer = QLinear.from_quantized(Q, torch.ones(32), formats.load("native"), torch.float32).to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float16
    assert layer.bias.dtype == layer.dtype == torch.bfloat16
    assert torch.equal(layer.quantized().scale, Q.scale)
    assert torch.equal(layer.double().dequantize(torch.float32), Q.dequantize())


def test_quantized_and_copies() -> None:
    Q = random(40, 100, Grid(3, 48, False))
    layer = QLinear.from_quantized(Q, None, formats.load("native"), torch.float32)
    for each in (layer, copy.deepcopy(layer)):
        found = each.quantized()
        assert torch.equal(found.codes, Q.codes)
        assert torch.equal(found.zero_point, Q.zero_point)
        assert torch.equal(each.dequantize(torch.float32), Q.dequantize())


def test_a_format_that_cannot_store_it_is_refused() -> None:
    with pytest.raises(FormatError, match="group 48 does not divide 100"):
        QLinear.from_quantized(random(32, 100, Grid(4, 48)), None, formats.load("compressed_tensors"), torch.float32)
    with pytest.raises(FormatError, match="embedding"):
        QEmbedding.from_quantized(random(32, 64, Grid(4, 32)), formats.load("compressed_tensors"), torch.float32)


def test_autocast() -> None:
    layer = QLinear.from_quantized(random(32, 64, Grid(4, 32)), None, formats.load("native"), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_is_the_dense_table_of_its_codes(bits: int, dtype: torch.dtype) -> None:
    for group_size in GROUPS:
        Q = random(50, 100, Grid(bits, group_size, False))
        table = QEmbedding.from_quantized(Q, formats.load("native"), dtype)
        ids = torch.tensor([[0, 49, 7], [7, 7, 3]])
        assert torch.equal(table(ids), F.embedding(ids, Q.dequantize().to(dtype)))
        assert table(ids[:0]).shape == (0, 3, 100)


def test_embedding_refuses_ids_outside_the_table() -> None:
    table = QEmbedding.from_quantized(random(50, 64, Grid(4, 32)), formats.load("native"), torch.float32)
    with pytest.raises(IndexError, match=r"-1\.\.50 for a table of 50 rows"):
        table(torch.tensor([-1, 50]))


def test_tied_head_shares_the_tables_storage() -> None:
    Q = random(50, 64, Grid(4, 32, False))
    table = QEmbedding.from_quantized(Q, formats.load("native"), torch.float32)
    head = QLinear(64, 50, False, encoding=Q.encoding, fmt=table.fmt, scale_dtype=torch.float16, dtype=torch.float32)
    share(head, table)
    assert all(a is b for a, b in zip(head.parts, table.parts, strict=True))
    x = torch.randn(3, 64)
    assert torch.equal(head(x), F.linear(x, table.dequantize(torch.float32)))
