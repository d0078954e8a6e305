"""One query over packed keys and values by generated code, against attention over decoded ones in float64."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("llvmlite")
from hfquant.llvm import machine
from hfquant.runtime import kv_packed
from hfquant.runtime.kernels import _EXPLAINED
from hfquant.runtime.kv_cache import CompressedLayer
from hfquant.runtime.llvm import attention

pytestmark = pytest.mark.skipif(machine.level() is None, reason="no instructions that generated code knows")


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFQUANT_KERNELS")


def made(
    tokens: int, size: int, value_size: int, group: int, queries: int, dtype: torch.dtype, bits: int = 8
) -> tuple[CompressedLayer, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    layer = CompressedLayer(bits, 20, group)
    keys = torch.randn(2, 3, tokens, size, generator=generator) + torch.randn(size, generator=generator)
    values = torch.randn(2, 3, tokens, value_size, generator=generator)
    layer.update(keys.to(dtype), values.to(dtype))
    return layer, torch.randn(2, 3 * queries, size, generator=generator).to(dtype)


def exact(layer: CompressedLayer, query: Tensor, mask: Tensor | None) -> Tensor:
    K = torch.cat([layer.tokens.keys(torch.float32).double(), layer.keys.double()], 2)
    V = torch.cat([layer.tokens.values(torch.float32).double(), layer.values.double()], 2)
    scores = query.double().unflatten(1, (3, -1)) @ K.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return (scores.softmax(-1) @ V).flatten(1, 2)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize(
    ("size", "value_size", "group", "queries"),
    [(64, 64, 64, 1), (128, 128, 64, 4), (16, 48, 16, 2), (96, 64, 32, 3), (256, 256, 100, 8)],
)
def test_against_float64(
    size: int, value_size: int, group: int, queries: int, dtype: torch.dtype, bound: float
) -> None:
    """float32 in between, within the bound of torch's way in `test_kv_attention`; in 16 bits, y is rounded once"""
    for tokens in (20 + group, 251, 400):
        layer, query = made(tokens, size, value_size, group, queries, dtype)
        mask = torch.ones(2, tokens, dtype=torch.bool)
        mask[1, : group + 7] = False  # a whole group, and more
        for seen in (None, mask):
            assert attention.refuses(layer.tokens, queries) is None
            y = attention.attend(query, layer.tokens, (layer.keys, layer.values), query.shape[-1] ** -0.5, seen)
            assert y is not None
            assert y.dtype == dtype
            assert 0 < relative(y, exact(layer, query, seen)) < bound


def test_large_scores_and_what_is_not_a_number() -> None:
    layer, query = made(300, 64, 64, 64, 2, torch.float32)
    recent = layer.keys, layer.values
    y = attention.attend(query * 1000, layer.tokens, recent, 1.0, None)
    assert y is not None
    torch.testing.assert_close(
        y, kv_packed.attend_reference(query * 1000, layer.tokens, recent, 1.0), rtol=0.02, atol=0.02
    )
    query[0, 1, 5] = float("nan")
    y = attention.attend(query, layer.tokens, recent, 0.1, None)
    assert y is not None
    assert y[0, 1].isnan().all()
    assert int(y.isnan().sum()) == 64


def test_the_number_of_threads_changes_nothing() -> None:
    layer, query = made(300, 64, 64, 64, 2, torch.bfloat16)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(kv_packed.attend(query, layer.tokens, (layer.keys, layer.values), 0.125))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("size", "queries", "bits", "says"),
    [
        (64, 2, 8, "groups of 64: generated code (not triton: "),
        (64, 2, 4, "not generated: 4 bits: not 8"),
        (20, 2, 8, "not generated: 20 channels of keys"),
        (64, 9, 8, "not generated: 9 queries of a head: more than 8"),
    ],
)
def test_says_what_runs(
    size: int, queries: int, bits: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HFQUANT_EXPLAIN", "1")
    _EXPLAINED.clear()
    layer, query = made(200, size, size, 64, queries, torch.float32, bits)
    y = kv_packed.attend(query, layer.tokens, (layer.keys, layer.values), size**-0.5)
    assert relative(y, exact(layer, query, None)) < 1e-5
    assert says in capsys.readouterr().err
