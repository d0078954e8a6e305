"""Sums over tokens, against the same in float64: generated code of every instruction set, and torch in its place."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfquant.runtime import gram
from hfquant.runtime.gram import add_gram, add_product

pytest.importorskip("llvmlite")
from hfquant.runtime.llvm import gram as generated
from hfquant.runtime.llvm.machine import LEVELS, level

LEVEL = level()
RUNS = [
    at
    for at in (LEVEL and generated.best(), LEVEL, LEVELS[-1])
    if at is not None and LEVEL is not None and set(LEVELS[-1].needs) <= set(LEVEL.needs)
]
SHAPES = [(1, 1), (2, 17), (3, 48), (130, 47), (257, 100), (512, 576), (1031, 193)]


def error(found: Tensor, exact: Tensor, size: Tensor) -> float:
    """Of float32 sums, over what rounding each of their terms may come to."""
    return float(((found.double() - exact).abs() / (size * 2**-23 + 1e-30)).max())


@pytest.fixture(params=[*RUNS, None], ids=lambda at: at.name if at else "torch")
def add(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds xᵀx or xᵀy by one way of doing it."""
    if request.param is None:
        monkeypatch.setattr(gram, "generated", lambda: False)
        return lambda S, x, y=None: add_gram(S, x) if y is None else add_product(S, x, y)
    return lambda S, x, y=None: generated.add(S, x, y, at=request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "n"), SHAPES)
def test_against_float64(add: Callable[..., None], tokens: int, n: int, dtype: torch.dtype) -> None:
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
        assert error(S[below], exact[below], size[below]) < 4 + tokens**0.5  # of sums one after the other


def test_sixteen_bits_of_the_other_kind() -> None:
    x = torch.randn(64, 96).half()
    S, C = torch.zeros(96, 96), torch.zeros(96, 96)
    add_gram(S, x * 200)  # whose squares are more than float16 can hold
    add_product(C, x, x)
    torch.testing.assert_close(S.tril(), ((x * 200).float().T @ (x * 200).float()).tril())
    torch.testing.assert_close(C, x.float().T @ x.float())


def test_what_is_not_a_number_stays_to_be_seen(add: Callable[..., None]) -> None:
    x = torch.randn(64, 60)
    x[5, 7] = float("nan")
    S = torch.zeros(60, 60)
    add(S, x)
    lower = S.tril()
    assert lower[7:, 7].isnan().all()
    assert lower[7, :8].isnan().all()
    assert int(lower.isnan().sum()) == 60


def test_strided_input(add: Callable[..., None]) -> None:
    wide = torch.randn(100, 128)
    S = torch.zeros(64, 64)
    add(S, wide[:, ::2])
    torch.testing.assert_close(S.tril(), (wide[:, ::2].T @ wide[:, ::2]).tril(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not RUNS, reason="no instructions that generated code knows")
def test_the_number_of_threads_changes_nothing() -> None:
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


@pytest.mark.skipif(not RUNS, reason="no instructions that generated code knows")
def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 8)
    for S, other in (
        (torch.zeros(8, 7), None),
        (torch.zeros(8, 8).double(), None),
        (torch.zeros(8, 8), torch.randn(5, 8)),
        (torch.zeros(8, 8), x.bfloat16()),
    ):
        with pytest.raises(ValueError, match="float32"):
            generated.add(S, x, other)


@pytest.mark.parametrize("missing", [True, False])
def test_explains_what_runs(missing: bool) -> None:
    lines = ["import sys", "sys.modules['llvmlite'] = None" if missing else ""]
    lines += ["from hfquant.runtime.gram import generated", "print(generated())"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True,
        env={"HFQUANT_EXPLAIN": "1", "PATH": ""},
    )  # fmt: skip
    ran = not missing and LEVEL is not None
    assert done.stdout.strip() == str(ran)
    assert f"sums over tokens by {'generated code' if ran else 'torch'}" in done.stderr
