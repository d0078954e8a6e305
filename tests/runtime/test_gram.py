"""Sums over tokens, against the same in float64: generated code of every instruction set, and torch in its place."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from hfquant import llvm
from hfquant.errors import ShapeError
from hfquant.runtime import gram
from hfquant.runtime.gram import add_gram, add_product

pytest.importorskip("llvmlite")
from hfquant.llvm import engine
from hfquant.llvm.machine import LEVELS, level
from hfquant.runtime.llvm import gram as generated
from hfquant.runtime.llvm import memory, sums
from tests.processes import fresh

LEVEL = level()
RUNS = [
    at
    for at in (LEVEL and generated.best(), LEVEL, LEVELS[-1])
    if at is not None and LEVEL is not None and set(LEVELS[-1].needs) <= set(LEVEL.needs)
]
SHAPES = [(1, 1), (2, 17), (3, 48), (130, 47), (257, 100), (512, 576), (2047, 193), (512, 64), (33, 16)]


def error(found: Tensor, exact: Tensor, size: Tensor) -> float:
    """Of float32 sums, over what rounding each of their terms may come to."""
    return float(((found.double() - exact).abs() / (size * 2**-23 + 1e-30)).max())


@dataclass(frozen=True)
class Way:
    """Adds xᵀx or xᵀy by one way of doing it; chunk: tokens at most that are summed one after the other."""

    run: Callable[..., None]
    chunk: int

    def __call__(self, S: Tensor, x: Tensor, y: Tensor | None = None) -> None:
        self.run(S, x, y)


@pytest.fixture(params=[*RUNS, None], ids=lambda at: at.name if at else "torch")
def add(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    if request.param is None:
        monkeypatch.setattr(gram, "refused", lambda *_: "switched off")
        return Way(lambda S, x, y: add_gram(S, x) if y is None else add_product(S, x, y), 1 << 20)
    memory.scratch(1 << 22)
    memory._LOCAL.memory.fill_(255)  # nothing but NaN, whatever was there before
    return Way(partial(generated.add, at=request.param), sums.CHUNK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "n"), SHAPES)
def test_against_float64(add: Way, tokens: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    x, y = torch.randn(tokens, n).to(dtype), torch.randn(tokens, n + 5).to(dtype)
    for other in (None, y):
        b = x if other is None else other
        S = torch.randn(n, b.shape[1])
        exact = S.double() + x.double().T @ b.double()
        size = S.double().abs() + x.double().abs().T @ b.double().abs()
        add(S, x, other)
        below = torch.ones(n, b.shape[1], dtype=torch.bool)
        below = below.tril() if other is None else below
        assert error(S[below], exact[below], size[below]) < 2 + min(tokens, add.chunk) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_several_turns(add: Way, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "DEPTH", 24)
    monkeypatch.setattr(generated, "NEAR", 2 * 24 * 4 * 48)
    x, y = torch.randn(201, 300).to(dtype), torch.randn(201, 250).to(dtype)
    S, C = torch.zeros(300, 300), torch.zeros(300, 250)
    add(S, x)
    add(C, x, y)
    for found, exact in ((S.tril(), (x.double().T @ x.double()).tril()), (C, x.double().T @ y.double())):
        torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-4)


def test_many_columns(add: Way) -> None:
    x, S = torch.randn(3, 1536).bfloat16(), torch.zeros(1536, 1536)
    add(S, x)
    torch.testing.assert_close(S.tril(), (x.float().T @ x.float()).tril())


def test_nothing_else_is_written(add: Way) -> None:
    x, around = torch.randn(70, 53), 4096
    memory = torch.full((around + 53 * 53 + around,), 7.0)
    S = memory[around : around + 53 * 53].view(53, 53)
    S.zero_()
    add(S, x)
    torch.testing.assert_close(S.tril(), (x.T @ x).tril())
    assert (memory[:around] == 7).all()
    assert (memory[-around:] == 7).all()


def test_sixteen_bits_of_the_other_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFQUANT_KERNELS")
    x = torch.randn(64, 96).half()
    S, C = torch.zeros(96, 96), torch.zeros(96, 96)
    add_gram(S, x * 200)  # whose squares are more than float16 can hold
    add_product(C, x, x)
    torch.testing.assert_close(S.tril(), ((x * 200).float().T @ (x * 200).float()).tril())
    torch.testing.assert_close(C, x.float().T @ x.float())


def test_what_is_not_a_number_stays_to_be_seen(add: Way) -> None:
    x = torch.randn(64, 60)
    x[5, 7] = float("nan")
    S = torch.zeros(60, 60)
    add(S, x)
    lower = S.tril()
    assert lower[7:, 7].isnan().all()
    assert lower[7, :8].isnan().all()
    assert int(lower.isnan().sum()) == 60


def test_strided_input(add: Way) -> None:
    wide = torch.randn(100, 128)
    S = torch.zeros(64, 64)
    add(S, wide[:, ::2])
    torch.testing.assert_close(S.tril(), (wide[:, ::2].T @ wide[:, ::2]).tril(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not RUNS, reason="no instructions that generated code knows")
def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFQUANT_KERNELS")
    x = torch.randn(2048, 300).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            S = torch.zeros(300, 300)
            generated.add(S, x)
            found.append(S.tril())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 8)
    for S, other in (
        (torch.zeros(8, 7), x),
        (torch.zeros(8, 8).double(), x),
        (torch.zeros(8, 8), torch.randn(5, 8)),
        (torch.zeros(8, 8), x.long()),
        (torch.zeros(8, 8, device="meta"), x),
    ):
        with pytest.raises(ShapeError, match=r"S is float32 \[n, m\]"):
            add_product(S, x, other)
    with pytest.raises(ShapeError, match="float32 \\[8, 7\\]"):
        add_gram(torch.zeros(8, 7), x)


@pytest.mark.skipif(not RUNS, reason="no instructions that generated code knows")
def test_code_that_cannot_be_made_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise RuntimeError("no memory may be executed\nhere")

    broke: list[str] = []
    monkeypatch.delenv("HFQUANT_KERNELS")
    monkeypatch.setattr(llvm, "BROKEN", broke)
    monkeypatch.setattr(gram, "BROKEN", broke)
    monkeypatch.setattr(engine, "function", fails)
    x, S = torch.randn(20, 8), torch.zeros(8, 8)
    with pytest.warns(RuntimeWarning, match="not used any more: their code could not be made: no memory may be exec"):
        add_gram(S, x)
    add_gram(S, x)  # without another warning
    torch.testing.assert_close(S.tril(), 2 * (x.T @ x).tril())
    assert broke == ["their code could not be made: no memory may be executed"]


def test_types_that_differ() -> None:
    x, y, S = torch.randn(9, 5).bfloat16(), torch.randn(9, 6).double(), torch.zeros(5, 6)
    add_product(S, x, y)
    torch.testing.assert_close(S, x.float().T @ y.float())


def test_a_sum_with_gaps(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HFQUANT_KERNELS")
    monkeypatch.setenv("HFQUANT_EXPLAIN", "1")
    x, S = torch.randn(30, 20), torch.zeros(20, 40)[:, ::2]
    add_gram(S, x)
    torch.testing.assert_close(S.tril(), (x.T @ x).tril())
    if LEVEL is not None:
        assert "by torch: the sum is not contiguous" in capfd.readouterr().err


def test_explains_what_runs() -> None:
    says = """
        import os
        os.environ |= {"HFQUANT_EXPLAIN": "1", "HFQUANT_KERNELS": "auto"}
        from hfquant.runtime.gram import add_gram
        S = torch.zeros(3, 3)
        add_gram(S, torch.ones(5, 3))
        print(S.diagonal().sum())
    """
    says = textwrap.dedent(says)
    here, without = fresh(f"import torch{says}", f"import sys, torch; sys.modules['llvmlite'] = None{says}")
    assert here.out.strip() == without.out.strip() == "tensor(15.)"
    assert f"sums over tokens by {'torch' if LEVEL is None else 'generated code'}" in here.err
    assert "sums over tokens by torch: needs llvmlite" in without.err
