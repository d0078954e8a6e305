"""One query over packed keys and values by generated code, against attention over decoded ones in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("llvmlite")
from hfquant.llvm import machine
from hfquant.runtime import kv_packed
from hfquant.runtime.kernels import _EXPLAINED
from hfquant.runtime.kv_cache import CompressedLayer
from hfquant.runtime.llvm import attention

HERE = machine.level()
pytestmark = pytest.mark.skipif(HERE is None, reason="no instructions that generated code knows")
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # y is rounded once, to 16 bits


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFQUANT_KERNELS")


def made(
    tokens: int,
    size: int,
    value_size: int,
    group: int,
    queries: int,
    dtype: torch.dtype,
    bits: int = 8,
    window: int = 20,
    rounded: bool = False,
) -> tuple[CompressedLayer, Tensor]:
    """Two sequences of 3 heads, keys with a channel that is large in all of them; and a query."""
    generator = torch.Generator().manual_seed(tokens)
    layer = CompressedLayer(bits, window, group, queries=8 if rounded else None)
    keys = torch.randn(2, 3, tokens, size, generator=generator) + torch.randn(size, generator=generator)
    values = torch.randn(2, 3, tokens, value_size, generator=generator)
    keys[..., 5] *= 9
    layer.update(keys.to(dtype), values.to(dtype))
    return layer, torch.randn(2, 3 * queries, size, generator=generator).to(dtype)


def exact(layer: CompressedLayer, query: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """In float64; where queries are rounded, products with packed keys are those of integers."""
    q, tokens = query.unflatten(1, (3, -1)), layer.tokens
    K = torch.cat([tokens.keys(torch.float32).double(), layer.keys.double()], 2)
    V = torch.cat([tokens.values(torch.float32).double(), layer.values.double()], 2)
    scores = q.double() @ K.mT
    if layer.queries:
        scores[..., : tokens.past] = integers(q.float(), layer)
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return (scores.softmax(-1) @ V).flatten(1, 2)


def integers(q: Tensor, layer: CompressedLayer) -> Tensor:
    """[b, h, queries, size] -> scores [b, h, queries, past]"""
    tokens, found = layer.tokens, []
    for g in range(tokens.past // layer.group):
        u = q * tokens.key_scale[:, :, g : g + 1].float()
        step = u.abs().amax(-1, keepdim=True) / 127
        codes = (u / step).round().long()
        assert int(codes.abs().max()) == 127
        low = q.double() @ tokens.key_low[:, :, g].double().unsqueeze(-1)
        found.append((codes @ tokens.key_codes()[:, :, g].long().mT) * step.double() + low)
    return torch.cat(found, -1)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def attended(layer: CompressedLayer, query: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    assert attention.refuses(layer.tokens, query.shape[1] // 3) is None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    y = attention.attend(query, layer.tokens, (layer.keys, layer.values), scale, mask)
    assert y is not None
    assert y.dtype == query.dtype
    return y


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("size", "value_size", "group", "queries", "bits", "rounded"),
    [
        (64, 64, 64, 1, 8, False), (128, 128, 64, 4, 8, False), (16, 48, 16, 2, 8, False), (96, 64, 32, 3, 8, False),
        (192, 192, 64, 7, 8, False), (256, 256, 100, 8, 8, False), (64, 64, 64, 3, 4, False),
        (128, 128, 32, 1, 2, False), (96, 96, 33, 2, 4, False), (64, 64, 64, 3, 8, True), (128, 128, 64, 4, 4, True),
        (192, 192, 64, 7, 8, True), (80, 64, 17, 2, 2, True), (256, 256, 100, 8, 8, True),
    ],
)  # fmt: skip
def test_against_float64(
    size: int, value_size: int, group: int, queries: int, bits: int, rounded: bool, dtype: torch.dtype
) -> None:
    """All that is generated anew, with hidden tokens and without, within the bound of torch's way."""
    for tokens in (20 + group, 251, 400):
        layer, query = made(tokens, size, value_size, group, queries, dtype, bits, rounded=rounded)
        mask = torch.ones(2, tokens, dtype=torch.bool)
        mask[1, : group + 7] = False  # a whole group, and more
        mask[0, : tokens - 50] = False  # as a window that slides
        for seen in (None, mask):
            y = attended(layer, query, seen)
            assert 0 < relative(y, exact(layer, query, seen)) < BOUNDS[dtype]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("window", [1, 70])
def test_of_any_length(window: int, rounded: bool) -> None:
    """From one group and one recent token on; more recent tokens than are looked at together."""
    for tokens in (17, 18, 31, 64, 89, 97, 134, 251, 500, 631, 997, 1000):
        if tokens >= window + 16:
            layer, query = made(tokens, 64, 64, 16, 3, torch.float32, 8, window, rounded)
            assert layer.tokens.past == (tokens - window) // 16 * 16
            assert 0 < relative(attended(layer, query), exact(layer, query)) < 1e-5


def levels() -> list[machine.Level]:
    """What else could be generated, and runs here: instructions that this machine may not have are spelled out."""
    if HERE is None:
        return []
    spelled = [replace(level, cpu=HERE.cpu, features=HERE.features, dot="emulated") for level in machine.LEVELS[:2]]
    return [*spelled, machine.LEVELS[-1]]


@pytest.mark.parametrize("level", levels(), ids=lambda level: f"{level.name}-{level.dot}")
def test_other_instructions_find_the_same(level: machine.Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, as all of them do the same sums in the same order; and products of the largest codes."""
    found: list[list[Tensor]] = []
    for at in (HERE, level):
        monkeypatch.setattr(machine, "level", lambda at=at: at)
        found.append([])
        for size, bits, rounded in ((64, 8, False), (64, 8, True), (96, 4, True)):
            layer, query = made(200, size, 64, 32, 3, torch.float32, bits, rounded=rounded)
            found[-1].append(attended(layer, query))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    keys, values = torch.ones(2, 3, 200, 64), torch.randn(2, 3, 200, 64)
    keys[:, :, ::9] = -1
    layer = CompressedLayer(8, 20, 32, queries=8)
    layer.update(keys, values)
    query = torch.full((2, 3, 64), 0.25)
    assert relative(attended(layer, query, scale=0.01), exact(layer, query, scale=0.01)) < 1e-5


@pytest.mark.parametrize("rounded", [False, True])
def test_large_scores_and_what_is_not_a_number(rounded: bool) -> None:
    layer, query = made(300, 64, 64, 64, 2, torch.float32, rounded=rounded)
    assert relative(attended(layer, query * 1000, scale=1.0), exact(layer, query * 1000, scale=1.0)) < 1e-3
    query[0, 1, 5] = float("nan")
    y = attended(layer, query)
    assert y[0, 1].isnan().all()
    assert int(y.isnan().sum()) == 64


def test_a_query_of_zeros_sees_all_alike() -> None:
    layer, query = made(300, 64, 64, 64, 2, torch.float32, rounded=True)
    V = torch.cat([layer.tokens.values(torch.float32), layer.values], 2).double()
    mean = V.mean(2, keepdim=True).expand(-1, -1, 2, -1).flatten(1, 2)
    assert relative(attended(layer, query * 0), mean) < 1e-5


@pytest.mark.parametrize("size", [64, 20])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_queries_in_torch(bits: int, size: int) -> None:
    """What runs where code is not generated computes the same."""
    layer, query = made(300, size, size, 64, 2, torch.float32, bits, rounded=True)
    recent = layer.keys, layer.values
    y = kv_packed.attend_reference(query, layer.tokens, recent, size**-0.5)
    assert relative(y, exact(layer, query)) < 1e-5
    layer.queries = None
    assert 1e-4 < relative(y, exact(layer, query)) < 0.05  # what rounding costs where one channel is 9 times the others


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
        (64, 2, 4, "of 4 bit, 64 channels, groups of 64: generated code"),
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
