"""Layers with rounded inputs: the reference's integers, and what follows from them.  Run by test_interpreted.py."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hfquant.runtime import integers, kernels
from hfquant.runtime.kernels.triton.configs import Config
from hfquant.runtime.kernels.triton.device.splits import JOINS
from hfquant.runtime.kernels.triton.rounded import rounded
from hfquant.runtime.kernels.triton.signed import prepare
from hfquant.runtime.kernels.triton.tokens import tokens
from hfquant.runtime.nn import QLinear
from hfquant.runtime.reference import Matrix
from hfquant.tensors import formats
from hfquant.tensors.activations import dynamic_scale, quantize
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import LowRank, Quantized

from ...rounding import random

NATIVE = formats.load("native")
TOKEN, SHIFTED = Activations(), Activations(symmetric=False)
GROUPS, SIX = Activations(8, "group", 64, False), Activations(6, "group", 32)
# bits, weights symmetric, group, activations
CASES = [
    (8, True, -1, TOKEN),
    (8, False, -1, SHIFTED),
    (8, True, 64, TOKEN),
    (4, True, 128, TOKEN),
    (4, False, 64, SHIFTED),
    (4, False, -1, TOKEN),
    (4, True, 128, GROUPS),
    (4, False, 32, SIX),
    (2, True, 64, SHIFTED),
    (3, False, -1, SHIFTED),
    (5, True, 64, GROUPS),
    (6, False, 192, TOKEN),
    (7, True, -1, SIX),
]


def inputs(rows: int, columns: int) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x[:, 3] *= 50  # an outlier: most codes are small
    return x.half()


def matrix(Q: Quantized) -> Matrix:
    return Matrix(list(NATIVE.pack(Q).values()), NATIVE, Q.encoding, Q.shape)


@pytest.mark.parametrize(
    "activations",
    [TOKEN, SHIFTED, SIX, GROUPS, Activations(4), Activations(5, "group", 100), Activations(8, "group", 1000)],
    ids=str,
)
def test_codes_are_those_of_the_definition(activations: Activations) -> None:
    x = torch.cat([inputs(3, 577), torch.zeros(1, 577), torch.arange(-288, 289)[None] / 2]).half()
    scale, zero = dynamic_scale(x, activations)
    found = tokens(x, activations, 640)
    assert torch.equal(found.codes[:, :577], quantize(x, activations, scale, zero))
    assert not found.codes[:, 577:].any()
    assert torch.equal(found.scale, scale)
    assert found.zero is None if activations.symmetric else torch.equal(found.zero, zero)
    given = tokens(x, activations, 640, (scale[:1, :1], None if activations.symmetric else zero[:1, :1]))
    if activations.per == "token":
        assert torch.equal(given.codes[:, :577], quantize(x, activations, scale[:1, :1], zero[:1, :1]))


@pytest.mark.parametrize(("bits", "symmetric", "group", "activations"), CASES, ids=str)
def test_results_are_those_of_the_reference(bits: int, symmetric: bool, group: int, activations: Activations) -> None:
    """Bit for bit where one integer makes each; groups are added up in float32, fused with the product or not."""
    Q = replace(random(20, 321, Grid(bits, group, symmetric)), activations=activations)
    for rows in (1, 17):
        x, W = inputs(rows, Q.shape[1]), prepare(Q, activations)
        scale, zero = dynamic_scale(x, activations)
        codes = quantize(x, activations, scale, zero)
        expected = integers.linear(codes, scale, zero, matrix(Q), integers.exact)
        y = rounded(tokens(x, activations, W.columns), W, torch.float32, config=Config(8 if rows == 1 else 32, 32))
        if W.whole:
            assert torch.equal(y, expected)
        else:
            assert (y - expected).abs().max() < 5e-7 * expected.abs().max()


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("group", [-1, 128])
def test_sums_split_over_columns(join: str, group: int) -> None:
    """Of integers they are exact in any order; of groups, float32 sums."""
    Q = replace(random(40, 450, Grid(4, group)), activations=SHIFTED)
    x, W = inputs(9, 450), prepare(Q, SHIFTED)
    seen = tokens(x, SHIFTED, W.columns)
    whole = rounded(seen, W, torch.float32, config=Config(16, 64))
    for split in (2, 2, 3):
        y = rounded(seen, W, torch.float32, config=Config(8, 32, split=split), join=join)
        if group == -1:
            assert torch.equal(y, whole)
        else:
            torch.testing.assert_close(y, whole, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("per", ["token", "group", "tensor", "static"])
def test_layers(per: str) -> None:
    """Through the dispatcher, with all that a layer may have beside its weights.

    With inputs in groups, sums of float32 are not to the bit: the reference adds in the order of the machine's BLAS, so
    a result near zero may be off by the rounding of its largest terms.
    """
    activations = Activations(8, per, 64 if per == "group" else -1, symmetric=False)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randint(-99, 99, s, dtype=torch.int8, generator=generator) for s in ((20, 3), (3, 300)))
    static = (
        {"activation_scale": torch.tensor([0.4]), "activation_zero": torch.tensor([-3.0])} if per == "static" else {}
    )
    plain = replace(random(20, 300, Grid(4, 64, False)), activations=activations, **static)
    full = replace(plain, input_scale=torch.rand(300) + 1, low_rank=LowRank(u=u, v=v, scale=torch.rand(3) * 1e-3))
    for Q, dtype in ((plain, torch.float16), (full, torch.float32)):
        layer = QLinear.from_quantized(Q, torch.randn(20), NATIVE, dtype)
        x = inputs(3, 300).to(dtype)
        with kernels.mode("reference"):
            expected = layer(x)
        with kernels.mode("gpu_rounded"):
            assert kernels.choose(x, layer.matrix).kernel.name == "gpu_rounded"
            y = layer(x)
        if per == "group" and dtype == torch.float32:
            assert (y - expected).abs().max() < 1e-6 * expected.abs().max()
        else:
            torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_what_it_does_not_take() -> None:
    layer = QLinear.from_quantized(
        replace(random(20, 300, Grid(4, 48)), activations=TOKEN), None, NATIVE, torch.float16
    )
    with kernels.mode("gpu_rounded"):
        assert kernels.choose(inputs(3, 300), layer.matrix).refused == (
            ("gpu_rounded", "16 columns share their scales: not a multiple of 32"),
        )
