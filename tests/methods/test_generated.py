"""The inner loops of rounding in generated code: what torch computes, for every kind of grid and number of threads."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("llvmlite")

from hfquant import llvm
from hfquant.llvm import engine, machine
from hfquant.llvm.threads import pool
from hfquant.methods import _columns, _descent, _obs, _products, _refine
from hfquant.methods._learned import learned
from hfquant.methods.gptq import Method as Gptq
from hfquant.tensors import _search
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer, Quantized
from tests.methods.test_gptq_crosscheck import layer

here = machine.level()
pytestmark = pytest.mark.skipif(here is None, reason="needs AVX2")
LEVELS = {level.name: level for level in machine.LEVELS}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# every width and size of groups, and rows that fill no strip
GRIDS = [Grid(2, 32, True), Grid(3, 64, False), Grid(4, 128, True), Grid(5, -1, False), Grid(8, 50, True)]
GRIDS += [Grid(1, 16, True), Grid(6, 32, False), Grid(7, -1, True), Grid(4, 5, False)]
Switch = Callable[[str], None]


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    """switch("auto"), switch("reference")"""
    return lambda mode: monkeypatch.setenv("HFQUANT_KERNELS", mode)


def both(switch: Switch, call: Callable[[], Tensor | tuple[Tensor, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    """What generated code and what torch makes of it."""
    made = []
    for mode in ("auto", "reference"):
        switch(mode)
        found = call()
        made.append(list(found) if isinstance(found, tuple) else [found])
    return made[0], made[1]


def factor(given: Layer) -> tuple[Tensor, Tensor]:
    assert given.H is not None
    found = _obs.inverse_factor(given.H, 0.01)
    assert found is not None
    return found[0], _obs.damped(given.H, 0.01).float()


def start(given: Layer, grid: Grid, dtype: torch.dtype) -> Quantized:
    scale, zero = grid.fit(given.W, dtype=dtype)
    return Quantized(codes=grid.encode(given.W, scale, zero), scale=scale, zero_point=zero, grid=grid)


def some_of(given: Layer) -> Tensor:
    return torch.rand(given.W.shape, generator=torch.Generator().manual_seed(1)) < 0.6


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(48, 192), (37, 200), (1, 33)], ids=str)
def test_a_sweep_chooses_the_same_codes(switch: Switch, shape: tuple[int, int], grid: Grid, masked: bool) -> None:
    given = layer(*shape)
    mask = some_of(given) if masked else None
    for dtype in DTYPES:
        method = Gptq(search=0, refine=0)
        ours, theirs = (
            method(replace(given, mask=mask, V=None if mask is None else given.W), grid, dtype).Q
            for _ in map(switch, ("auto", "reference"))
        )
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(100, 192), (37, 300), (1, 33)], ids=str)
def test_a_descent_chooses_the_same_codes(switch: Switch, shape: tuple[int, int], grid: Grid, masked: bool) -> None:
    given = layer(*shape)
    _, H = factor(given)
    Q = start(given, grid, torch.float16)
    D = (Q.dequantize() - given.W).T.contiguous()
    pruned = ~some_of(given).T.contiguous() if masked else None
    codes, scale = Q.codes.T.float().contiguous(), Q.scale.float()
    ours, theirs = both(switch, lambda: _refine.descend(codes, scale, D.clone(), H, grid, 128, pruned))
    assert (ours[0] == theirs[0]).double().mean() > 0.9999
    assert (ours[0] != codes).any() or min(shape) == 1
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=0)
    E = (grid.decode(ours[0].T, Q.scale, Q.zero_point) - given.W).double()
    torch.testing.assert_close(ours[1].double(), ((E @ H.double()) * E).sum(1), rtol=1e-4, atol=0)
    if pruned is not None:
        assert torch.equal(ours[0][pruned], codes[pruned])


@pytest.mark.parametrize("columns", [8, 32, 50, 300])
@pytest.mark.parametrize("rows", [1, 64, 77])
def test_products_of_groups(switch: Switch, rows: int, columns: int) -> None:
    _, H = factor(layer(rows, 300))
    V = torch.randint(-8, 8, (300, rows), generator=torch.Generator().manual_seed(0)).float()
    (ours,), (theirs,) = both(switch, lambda: _refine.products(V, H, columns))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert torch.equal(ours, ours.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_same_ranges_are_found(switch: Switch, grid: Grid, dtype: torch.dtype) -> None:
    """But where two are equally good up to the order of a sum."""
    draw = torch.Generator().manual_seed(0)
    W, h = torch.randn(101, 200, generator=draw) * 0.05, torch.rand(200, generator=draw) ** 4 + 1e-3
    W[0], W[1], W[2] = 0, 1e-9, W[2] * 1e6  # scales that are too small and too large for 16 bits
    ours, theirs = both(switch, lambda: grid.fit(W, h, search=30, dtype=dtype))
    assert (ours[0] == theirs[0]).double().mean() > 0.995
    assert torch.equal(ours[0][:3], theirs[0][:3])

    def lost(scale: Tensor, zero: Tensor) -> Tensor:
        D = grid.decode(grid.encode(W, scale, zero), scale, zero) - W
        return (D[3:].double().square() * h).sum()

    torch.testing.assert_close(lost(*ours), lost(*theirs), rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", GRIDS[:5], ids=str)
def test_the_whole_method(switch: Switch, grid: Grid) -> None:
    given = layer(70, 256, 1024)
    done = [Gptq()(given, grid, torch.bfloat16) for _ in map(switch, ("auto", "reference"))]
    ours, theirs = (each.Q for each in done)
    assert ours is not None
    assert theirs is not None
    assert (ours.codes == theirs.codes).double().mean() > 0.99
    assert abs(done[0].error() / done[1].error() - 1) < 1e-3


@pytest.mark.skipif(pool() is None, reason="torch has no OpenMP here")
def test_threads_change_nothing(switch: Switch) -> None:
    given, grid = layer(200, 160), Grid(4, 32, False)
    U, H = factor(given)
    Q = start(given, grid, torch.float16)
    D, codes = (Q.dequantize() - given.W).T.contiguous(), Q.codes.T.float().contiguous()
    S, Z = Q.scale.float().T.contiguous(), Q.zero_point.float().T.contiguous()
    groups = torch.arange(160) // 32

    def everything() -> tuple[Tensor, ...]:
        swept = torch.empty(160, 200, dtype=torch.uint8)
        E = _columns.round_block(given.W.T[:100].contiguous(), U, groups[:100], S, Z, 15, None, swept[:100])
        assert E is not None
        moved = _refine.descend(codes, Q.scale.float(), D.clone(), H, grid, 64)
        return swept[:100], E, *moved, _refine.products(codes, H, 32), *grid.fit(given.W, search=20)

    switch("auto")
    alone = everything()
    torch.set_num_threads(2)
    try:
        assert [torch.equal(a, b) for a, b in zip(everything(), alone, strict=True)] == [True] * len(alone)
    finally:
        torch.set_num_threads(1)


def test_blocks_change_nothing_but_speed(switch: Switch) -> None:
    switch("auto")
    given = layer(24, 300)
    found = [Gptq(block=block, refine=0)(given, Grid(4, 32), torch.float16).Q for block in (7, 128, 1000)]
    for Q in found[1:]:
        assert found[0] is not None
        assert Q is not None
        assert (Q.codes == found[0].codes).double().mean() > 0.999


LOOPS = [_columns.ROUND, _descent.DESCENT, _products.PRODUCTS]
LOOPS += [_search.loop(symmetric, dtype) for symmetric in (True, False) for dtype in DTYPES]


@pytest.mark.parametrize(("name", "register"), [("avx512vnni", "zmm"), ("avx2", "ymm")])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_it_compiles_for_other_processors(loop: object, name: str, register: str) -> None:
    text = engine.assembly(LEVELS[name], loop.generate)  # type: ignore[attr-defined]
    assert f"%{register}" in text
    assert register == "zmm" or "%zmm" not in text
    assert "roundevenf" not in text  # no call of a library


def test_the_narrow_twin_computes_the_same(switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2's code, whose tiles are smaller."""
    switch("auto")
    given, grid = layer(70, 160), Grid(4, 32, False)

    def done() -> Quantized | None:
        return Gptq()(given, grid, torch.float16).Q

    wide = done()
    monkeypatch.setattr(machine, "level", lambda: LEVELS["avx2"])
    narrow = done()
    assert wide is not None
    assert narrow is not None
    assert (wide.codes == narrow.codes).double().mean() > 0.999


def test_without_llvmlite_torch_does_it(switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("No module named 'llvmlite'")

    switch("auto")
    assert llvm.refused(torch.ones(1)) is None
    assert "CPU" in str(llvm.refused(torch.ones(1, device="meta")))
    monkeypatch.setattr(machine, "level", missing)
    assert "pip install 'hfquant[cpu]'" in str(llvm.refused(torch.ones(1)))
    assert Gptq()(layer(8, 64), Grid(4, 32), torch.float16).Q is not None


def test_code_that_cannot_be_made_is_not_asked_for_again(switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise RuntimeError("LLVM ERROR: no such instruction\nand more")

    given, grid = layer(24, 96), Grid(4, 32)
    switch("reference")
    expected = Gptq()(given, grid, torch.float16).Q
    switch("auto")
    monkeypatch.setattr(llvm, "BROKEN", [])
    monkeypatch.setattr("hfquant.llvm.strips.BROKEN", llvm.BROKEN)
    monkeypatch.setattr(engine, "function", fail)
    with pytest.warns(RuntimeWarning, match="generated loops are not used any more: .*no such instruction") as said:
        found = Gptq()(given, grid, torch.float16).Q
    assert len(said) == 1
    assert expected is not None
    assert found is not None
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "grid", [Grid(3, 32, False), Grid(4, 16, True), Grid(8, -1, False), Grid(4, 64, True)], ids=str
)
def test_a_weight_that_learns_and_its_gradients(switch: Switch, grid: Grid, dtype: torch.dtype) -> None:
    """The weight to the bit; of the gradients the codes' too, the scales' up to the order of a sum."""
    draw = torch.Generator().manual_seed(0)
    W, G = torch.randn(37, 192, generator=draw), torch.randn(37, 192, generator=draw).to(dtype)
    Q = start(replace(layer(37, 192), W=W), grid, torch.float16)

    def learn() -> tuple[Tensor, ...]:
        one = learned(Q, W)
        with torch.no_grad():  # some beyond both ends of the range
            one.latent.add_(torch.randn(one.latent.shape, generator=torch.Generator().manual_seed(1)))
        for t in (one.latent, one.scale):
            t.requires_grad_()
        weight = one.weight(dtype)
        assert weight.dtype == dtype
        weight.backward(G)
        assert one.latent.grad is not None
        assert one.scale.grad is not None
        return weight.detach(), one.latent.grad, one.scale.grad

    ours, theirs = both(switch, learn)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert (ours[1] == 0).any()
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-4, atol=1e-4)
