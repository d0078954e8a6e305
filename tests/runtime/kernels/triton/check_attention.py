"""One query over a compressed cache.  Run by test_interpreted.py."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from hfquant.runtime.kernels.triton.attention import attend, refuses
from hfquant.runtime.kv_cache import CompressedLayer
from hfquant.runtime.kv_packed import attend_reference


def cache(bits: int, batch: int, heads: int, tokens: int, size: int, group: int, dtype: torch.dtype) -> CompressedLayer:
    """A layer that has seen so many tokens, keys with channels that are large."""
    generator = torch.Generator().manual_seed(0)
    layer = CompressedLayer(bits, 20, group)
    keys, values = (torch.randn(batch, heads, tokens, size, generator=generator) for _ in range(2))
    keys[..., 3] *= 8
    layer.update(keys.to(dtype), values.to(dtype))
    return layer


def expected(query: Tensor, layer: CompressedLayer, mask: Tensor | None) -> Tensor:
    """From decoded keys and values, in float64."""
    keys = torch.cat([layer.tokens.keys(torch.float32), layer.keys], 2).double()
    values = torch.cat([layer.tokens.values(torch.float32), layer.values], 2).double()
    batch, heads, _, size = keys.shape
    scores = query.double().view(batch, heads, -1, size) @ keys.transpose(2, 3) / math.sqrt(size)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return (scores.softmax(-1) @ values).flatten(1, 2)


@pytest.mark.parametrize(("bits", "size"), [*product((2, 4, 8), (64,)), (4, 128), (4, 96), (8, 80)])
def test_attention(bits: int, size: int) -> None:
    """Heads that share keys, sizes that are no power of two, hidden tokens, shares without tokens."""
    batch, heads = (2, 1) if size == 64 else (1, 2)
    layer = cache(bits, batch, heads, 120, size, 32, torch.float16)
    query = torch.randn(batch, 3 * heads, size).half()
    mask = torch.ones(batch, 120, dtype=torch.bool)
    mask[-1, :70] = False  # a short prompt, padded on the left
    assert layer.past == 96
    y = attend(query, layer.tokens, (layer.keys, layer.values), 1 / math.sqrt(size), mask, 4)
    assert y.dtype == torch.float16
    want = expected(query, layer, mask)
    assert float((y.double() - want).norm() / want.norm()) < 2e-3
    plain = attend_reference(query, layer.tokens, (layer.keys, layer.values), 1 / math.sqrt(size), mask)
    assert float((plain.double() - want).norm() / want.norm()) < 1e-3


@pytest.mark.parametrize("size", [64, 80])
def test_rounded_queries(size: int) -> None:
    """Products with codes are the reference's integers: what rounding costs is many times their difference."""
    torch.manual_seed(1)  # numbers whose rounding costs enough to be told from the kernel's own
    layer = cache(8, 2, 1, 120, size, 32, torch.float16)
    query, recent = torch.randn(2, 3, size).half(), (layer.keys, layer.values)
    query[0, 2] = 0
    mask = torch.ones(2, 120, dtype=torch.bool)
    mask[-1, :70] = False
    as_it_is = attend_reference(query, layer.tokens, recent, 1 / math.sqrt(size), mask)
    layer.queries = 8
    want = attend_reference(query, layer.tokens, recent, 1 / math.sqrt(size), mask)
    y = attend(query, layer.tokens, recent, 1 / math.sqrt(size), mask, 4)
    error = float((y.double() - want).norm() / want.norm())
    assert error < 1.5e-3
    assert float((y.double() - as_it_is).norm() / want.norm()) > max(6e-3, 8 * error)


def test_bfloat16() -> None:
    layer = cache(4, 1, 1, 100, 64, 64, torch.bfloat16)
    query = torch.randn(1, 4, 64).bfloat16()
    y, want = attend(query, layer.tokens, (layer.keys, layer.values), 0.125), expected(query, layer, None)
    assert float((y.double() - want).norm() / want.norm()) < 1e-2  # the interpreter cuts bfloat16 off


def test_what_it_does_not_take() -> None:
    assert refuses(64, 64, 4, 64, 64) is None
    assert refuses(64, 64, 4, 40, 64) == "groups of 40 tokens: not a multiple of 16"
    assert refuses(64, 64, 2, 64, 12) == "12 channels of 2 bits do not fill whole words"
    assert refuses(320, 64, 2, 64, 64) == "heads of 320 channels: more than 256"
    assert refuses(64, 64, 8, 64, 64, 8) is None
    assert refuses(64, 64, 4, 64, 64, 8) == "queries are rounded for keys of 8 bit, not 4"
