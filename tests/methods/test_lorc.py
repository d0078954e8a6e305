"""Low-rank compensation: the best there is of its rank, in 8 bit, and never worse than nothing."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from hfquant.methods import gptq, lorc, rtn, sparsegpt
from hfquant.methods._spectrum import leading
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer

GRID = Grid(3, 32, False)


def inputs(n: int, tokens: int, seed: int = 0) -> Tensor:
    """Correlated inputs with a few large columns, as layers have them.  [n, tokens]"""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=g) * torch.logspace(0, -2, n)[:, None]
    return (mixing.T @ torch.randn(n, tokens, generator=g)) * torch.logspace(0.5, -0.5, n)[:, None]


def layer(out: int = 48, n: int = 96, tokens: int = 400, seed: int = 0) -> Layer:
    W = torch.randn(out, n, generator=torch.Generator().manual_seed(seed + 1)) / n**0.5
    X = inputs(n, tokens, seed)
    return Layer(name="l", W=W, H=2 / tokens * X @ X.T)


def rounded(of: Layer) -> Layer:
    return rtn.Method()(of, GRID, torch.float16)


@pytest.mark.parametrize(
    ("out", "n"), [(48, 96), (96, 48), (50, 50), (640, 600)], ids=["wide", "tall", "square", "lanczos"]
)
def test_leading_directions_are_those_of_an_svd(out: int, n: int) -> None:
    M = torch.randn(out, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, left = leading(M, 5)
    u, s, _ = scipy.linalg.svd(M.numpy(), full_matrices=False)
    assert np.abs(np.abs(u[:, :5].T @ A.numpy()) - np.eye(5)).max() < 1e-6  # up to sign
    expected = (s**2).sum() - np.concatenate([[0], (s[:5] ** 2).cumsum()])
    assert np.allclose(left.numpy(), expected, rtol=1e-9)


def test_plain_is_the_svd_of_the_error() -> None:
    before = rounded(layer())
    E = (before.W - before.effective).double().numpy()
    u, s, vt = np.linalg.svd(E)
    best = (u[:, :6] * s[:6]) @ vt[:6]
    done = lorc.Method(rank=6, weighted=False)(before, GRID, torch.float16)
    assert done.low_rank is not None
    # 8 bit apart: the difference is a fraction of the correction, and of the size that 8 bit make
    assert 0 < np.linalg.norm(done.low_rank.dense().numpy() - best) < 0.03 * np.linalg.norm(best)
    exact = np.linalg.norm(E - best)
    assert exact < np.linalg.norm(E - done.low_rank.dense().numpy()) < 1.001 * exact


def test_weighted_is_optimal_in_the_metric_of_the_layer() -> None:
    """Against the closed form with H^(1/2), in float64, and against a general optimizer that starts from it."""
    before = rounded(layer())
    assert before.H is not None
    E, H = (before.W - before.effective).double(), lorc.damped(before.H, 0.01)
    root = torch.from_numpy(scipy.linalg.sqrtm(H.numpy()).real)
    u, s, vt = torch.linalg.svd(E @ root, full_matrices=False)
    closed = (u[:, :4] * s[:4]) @ vt[:4] @ torch.linalg.inv(root)

    L = lorc.factor(before.H, 0.01)
    assert L is not None
    A, left = leading(E @ L, 4)
    assert torch.allclose(A @ (A.T @ E), closed, atol=1e-9)
    assert float(left[4]) == pytest.approx(float((s[4:] ** 2).sum()))

    def lost(U: Tensor, V: Tensor) -> Tensor:
        D = E - U @ V
        return ((D @ H) * D).sum()

    noise = torch.randn(A.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    U = (A + 0.1 * noise).contiguous().requires_grad_()
    V = (A.T @ E).contiguous().requires_grad_()
    descent = torch.optim.LBFGS([U, V], max_iter=2000, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Tensor:
        descent.zero_grad()
        value = lost(U, V)
        value.backward()
        return value

    descent.step(closure)  # type: ignore[no-untyped-call]
    found, ours = float(lost(U, V).detach()), float(lost(A, A.T @ E))
    assert ours <= found * (1 + 1e-9)
    assert found < 1.01 * ours  # the optimizer did arrive


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_eight_bits_lose_next_to_nothing(rank: int) -> None:
    before = rounded(layer())
    assert before.H is not None
    E = (before.W - before.effective).double()
    L = lorc.factor(before.H, 0.01)
    assert L is not None
    A, _ = leading(E @ L, rank)
    exact = Layer(name="l", W=E.float(), H=before.H, V=(A @ (A.T @ E)).float()).error()
    packed = lorc.factors(E, A)
    assert (packed.u.dtype, packed.v.dtype, packed.scale.dtype) == (torch.int8, torch.int8, torch.float32)
    assert (packed.u.shape, packed.v.shape, packed.scale.shape) == ((48, rank), (rank, 96), (rank,))
    assert int(packed.u.abs().amax()) == int(packed.v.abs().amax()) == 127  # both use all of their range
    assert exact < Layer(name="l", W=E.float(), H=before.H, V=packed.dense()).error() < 1.01 * exact


def test_solving_for_v_makes_up_for_the_rounding_of_u() -> None:
    E = (rounded(layer()).W - rounded(layer()).effective).double()
    A, _ = leading(E, 8)
    u, su = lorc._int8(A.T)
    naive = E - (u.T * su) @ (A.T @ E)
    U = u.T * su
    solved = E - U @ torch.linalg.lstsq(U, E).solution
    assert float(solved.norm()) < float(naive.norm())


@pytest.mark.parametrize("method", [rtn.Method(), gptq.Method()], ids=["rtn", "gptq"])
def test_weighted_recovers_more_than_plain(method: rtn.Method | gptq.Method) -> None:
    before = method(layer(), GRID, torch.float16)
    plain, weighted = (lorc.Method(rank=8, weighted=w)(before, GRID, torch.float16).error() for w in (False, True))
    assert weighted < 0.97 * plain
    assert weighted < 0.9 * before.error()


def test_more_rank_less_error() -> None:
    before = rounded(layer())
    errors = [lorc.Method(rank=r)(before, GRID, torch.float16).error() for r in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < before.error()


def test_without_inputs_it_is_plain() -> None:
    before = rounded(layer())
    blind = Layer(name="l", W=before.W, Q=before.Q)
    done = lorc.Method()(blind, GRID, torch.float16)
    plain = lorc.Method(weighted=False)(blind, GRID, torch.float16)
    assert done.low_rank is not None
    assert plain.low_rank is not None
    assert torch.equal(done.low_rank.dense(), plain.low_rank.dense())
    assert "plain SVD" in done.notes[-1]
    assert not plain.notes


def test_it_makes_up_for_what_was_pruned() -> None:
    """Without any rounding: E is what the mask took away."""
    whole = layer()
    mask = whole.W.abs() > whole.W.abs().median()
    pruned = Layer(name="l", W=whole.W, H=whole.H, mask=mask)
    done = lorc.Method(rank=8)(pruned, Grid(16, -1), torch.float16)
    assert done.Q is None
    assert 0 < done.error() < 0.9 * pruned.error()


def test_never_worse_and_left_out_where_nothing_is_gained() -> None:
    exact = Layer(name="l", W=torch.ones(8, 16), V=torch.ones(8, 16))
    done = lorc.Method(rank=2)(exact, Grid(16, -1), torch.float16)
    assert done.low_rank is None
    assert "left out" in done.notes[-1]


@pytest.mark.parametrize("tokens", [3, 400], ids=["starved", "enough"])
@pytest.mark.parametrize("seed", range(5))
def test_never_raises_the_error(seed: int, tokens: int) -> None:
    before = rounded(layer(tokens=tokens, seed=seed))
    assert lorc.Method(rank=4)(before, GRID, torch.float16).error() <= before.error()


def drifted(seed: int = 0) -> tuple[Layer, Tensor, Tensor]:
    """A layer that reads something else than it did in the original model, and both: (layer, X, X̃)."""
    whole, original = layer(tokens=2000, seed=seed), inputs(96, 2000, seed)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(seed + 2))
    X = original + 0.1 * original.std(1, keepdim=True) * noise + 0.2 * original.roll(1, 0)
    return replace(whole, H=2 / 2000 * X @ X.T, C=2 / 2000 * original @ X.T), X, original


@pytest.mark.parametrize(
    "before", [gptq.Method(match_original=1.0), sparsegpt.Method(sparsity=0.5, match_original=1.0)], ids=["gptq", "50%"]
)
@pytest.mark.parametrize("seed", range(3))
def test_it_corrects_towards_what_the_steps_before_aim_at(before: Callable[..., Layer], seed: int) -> None:
    """They make up for what earlier layers lost; a correction towards W would undo that."""
    given, X, original = drifted(seed)
    done = before(given, GRID, torch.float16)
    assert done.aim is not None
    corrected = lorc.Method(rank=8)(done, GRID, torch.float16)
    towards = lorc.Method(rank=8)(replace(done, aim=None), GRID, torch.float16)
    wanted = given.W @ original
    nothing, ours, other = (float((of.effective @ X - wanted).norm()) for of in (done, corrected, towards))
    assert ours < nothing
    assert ours < other
    assert corrected.error() < done.error()


def test_a_layer_that_stays_as_it_is_has_no_aim() -> None:
    """Where `max_error` forbids pruning altogether, nothing is lost, and a step behind it aims for itself."""
    given, _, _ = drifted()
    left = sparsegpt.Method(sparsity=0.5, max_error=1e-6, match_original=1.0)(given, GRID, torch.float16)
    assert left.mask is None
    assert left.aim is None
    assert left.error() == 0
    assert gptq.Method(match_original=0)(left, GRID, torch.float16).aim is None


def test_errors_are_counted_from_the_aim() -> None:
    given, _, _ = drifted()
    done = gptq.Method(match_original=0.5)(given, GRID, torch.float16)
    assert done.aim is not None
    assert given.H is not None
    root = torch.linalg.cholesky(given.H.double())
    far = ((done.aim - done.effective).double() @ root).norm() / (given.W.double() @ root).norm()
    assert done.error() == pytest.approx(float(far), rel=1e-4)
    plain = gptq.Method(match_original=0)(given, GRID, torch.float16)
    assert plain.aim is None
    assert done.error() < 1.05 * plain.error(), "what it does on purpose is no error"
    assert replace(done, aim=None).error() > 1.1 * done.error()


def test_an_unusable_hessian() -> None:
    whole = layer()
    broken = Layer(name="l", W=whole.W, H=torch.full((96, 96), torch.inf), Q=rounded(whole).Q)
    done = lorc.Method(rank=4, weighted=True)(broken, GRID, torch.float16)
    assert "plain SVD" in done.notes[0]


def planted(strength: float) -> Layer:
    """An error of rank 3 under noise."""
    g = torch.Generator().manual_seed(0)
    E = torch.randn(64, 128, generator=g)
    E += strength * torch.randn(64, 3, generator=g) @ torch.randn(3, 128, generator=g)
    return Layer(name="l", W=E, V=torch.zeros(64, 128))


def test_the_searched_rank_is_that_of_a_planted_error() -> None:
    done = lorc.Method(rank=0, weighted=False)(planted(3.0), Grid(16, -1), torch.float16)
    assert done.low_rank is not None
    assert done.low_rank.rank == 3
    assert lorc.Method(rank=0, most=2, weighted=False)(planted(3.0), Grid(16, -1), torch.float16).low_rank.rank == 2  # type: ignore[union-attr]
    noise = lorc.Method(rank=0, weighted=False)(planted(0.0), Grid(16, -1), torch.float16)
    assert noise.low_rank is None
    assert "no rank pays" in noise.notes[-1]


def test_a_rank_pays_where_a_finer_grid_would_do_less() -> None:
    """A bit per weight divides the squared error by 4; 8 ranks of 64 + 64 bytes are 2 bits per weight of 64 x 64."""
    halving = torch.tensor([1.0, *(4.0 ** -(2 / 8 * k * 1.01) for k in range(1, 9))], dtype=torch.float64)
    assert lorc.paying(halving, (64, 64)) == 8
    assert lorc.paying(halving.sqrt(), (64, 64)) == 0


def test_shorthand() -> None:
    assert lorc.Method.shorthand("r8") == {"rank": 8}
    assert lorc.Method.shorthand("auto") == {"rank": 0}
    for wrong in ("8", "r0", "rx", "r", "r-1"):
        with pytest.raises(ValueError, match="write the rank"):
            lorc.Method.shorthand(wrong)


def test_check_names_both_ranks() -> None:
    lorc.Method(rank=8).check((8, 16))
    with pytest.raises(ValueError, match="8 x 16 has no more than rank 8, not 9"):
        lorc.Method(rank=9).check((8, 16))
