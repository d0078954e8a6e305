import math

import pytest
import torch
from torch import Tensor

from hfquant.tensors.grid import Grid, storable

WIDTHS = (576, 192, 33, 7, 1)
GRIDS = [Grid(b, g, s) for b in range(2, 9) for g in (-1, 1, 32, 50, 128) for s in (True, False)]


def weights(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05


def projected(grid: Grid, W: Tensor, **options: object) -> Tensor:
    scale, zero = grid.fit(W, **options)
    return grid.decode(grid.encode(W, scale, zero), scale, zero)


@pytest.mark.parametrize("in_features", WIDTHS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_within_half_a_step(grid: Grid, in_features: int) -> None:
    W = weights(5, in_features)
    scale, zero = grid.fit(W, dtype=torch.float32)
    assert scale.shape == zero.shape == (5, math.ceil(in_features / grid.columns(in_features)))
    codes = grid.encode(W, scale, zero)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= 2**grid.bits - 1
    step = grid.expand(scale, in_features).abs()
    # the extreme opposite to the larger one may lie up to one step outside a symmetric grid; an asymmetric grid
    # is shifted by up to half a step, since zero has to be one of its values
    assert ((grid.decode(codes, scale, zero) - W).abs() <= step * 1.001).all()
    inside = (codes > 0) & (codes < grid.top)
    assert ((grid.decode(codes, scale, zero) - W).abs() <= step * 0.5001)[inside].all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_every_code_survives_decode_and_encode(bits: int, symmetric: bool) -> None:
    grid = Grid(bits, -1, symmetric)
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    for zero in (grid.middle, 0, grid.top):
        for scale in (0.37, -0.37, 6e-8, 65504.0):
            s, z = torch.tensor([[scale]], dtype=torch.float16), torch.tensor([[zero]], dtype=torch.uint8)
            assert torch.equal(grid.encode(grid.decode(codes, s, z), s, z), codes)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.group_size != 1], ids=str)
def test_what_is_on_the_grid_stays(grid: Grid) -> None:
    """A group that reaches from one end of the grid to the other is found exactly."""
    columns = 64 if grid.group_size == -1 else grid.group_size
    codes = torch.randint(0, grid.top + 1, (4, 2 * columns), generator=torch.Generator().manual_seed(0))
    codes = codes.view(4, 2, columns)
    codes[..., 0], codes[..., 1] = 0, grid.top
    codes = codes.view(4, 2 * columns)
    values = 0.25 * (codes.float() - grid.middle)
    assert torch.equal(projected(grid, values), values)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_larger_extreme_of_a_symmetric_group_is_exact(bits: int, sign: int) -> None:
    """The side with one more step goes to the larger extreme; at one bit it is the only side there is."""
    W = sign * torch.tensor([[1.0, 0.9, -0.3, 0.0]])
    assert projected(Grid(bits, -1, True), W)[0, 0] == W[0, 0]


def test_zero_is_always_a_value() -> None:
    for grid in GRIDS:
        W = weights(3, 96) + 0.2  # all on one side
        W[:, ::7] = 0
        assert (projected(grid, W)[:, ::7] == 0).all(), grid


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("search", [0, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_groups_of_zeros_stay_zero(dtype: torch.dtype, search: int, symmetric: bool) -> None:
    W = weights(4, 96)
    W[:, 32:64] = 0
    grid = Grid(4, 32, symmetric)
    scale, zero = grid.fit(W, torch.ones(96), search=search, dtype=dtype)
    assert (scale != 0).all()
    assert (grid.decode(grid.encode(W, scale, zero), scale, zero)[:, 32:64] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("search", [0, 20])
@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e-7, 1e4, 1e7, 1e30])
def test_huge_and_subnormal_weights_in_half_precision_scales(size: float, search: int, symmetric: bool) -> None:
    W = weights(4, 64) * size
    grid = Grid(4, 32, symmetric)
    scale, zero = grid.fit(W, search=search, dtype=torch.float16)
    assert scale.dtype == torch.float16
    assert torch.isfinite(scale).all()
    assert (scale != 0).all()
    values = grid.decode(grid.encode(W, scale, zero), scale, zero)
    assert torch.isfinite(values).all()
    assert (values - W).norm() <= W.norm() * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_stored_scales_are_finite_and_never_zero(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    given = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 0.1, -0.1, 3e38, -3e38])
    kept = storable(given, dtype)
    assert torch.equal(kept.to(dtype).float(), kept)
    assert (kept != 0).all()
    assert kept.abs().max() <= info.max
    assert torch.equal(kept.sign()[2:], given.sign()[2:])


@pytest.mark.parametrize("grid", [Grid(b, g, s) for b in (2, 3, 4) for g in (32, -1) for s in (True, False)], ids=str)
def test_search_lowers_the_weighted_error(grid: Grid) -> None:
    W = weights(32, 128)
    W[:, ::17] *= 5
    h = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.01

    def lost(search: int) -> float:
        return float(((projected(grid, W, importance=h, search=search) - W).square() * h).sum())

    assert 0 < lost(40) <= lost(20) < lost(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_codes_are_chosen_for_the_scales_that_are_stored(dtype: torch.dtype) -> None:
    grid, W = Grid(8, 32, True), weights(16, 64)
    scale, zero = grid.fit(W, dtype=dtype)
    exact, _ = grid.fit(W, dtype=torch.float32)
    assert not torch.equal(scale.float(), exact)
    step = grid.expand(scale.double(), 64)
    nearest = (W.double() / step + grid.middle).round().clamp(0, grid.top)
    assert (grid.encode(W, scale, zero) == nearest).double().mean() > 0.999


def test_rows_are_fitted_alike_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    W = weights(50, 96)
    whole = Grid(4, 32, False).fit(W, search=10)
    monkeypatch.setattr("hfquant.tensors.grid.CHUNK", 7 * 96)
    parts = Grid(4, 32, False).fit(W, search=10)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(
    ("grid", "text"),
    [(Grid(4, 128, True), "w4g128sym"), (Grid(3, -1, False), "w3"), (Grid(8, -1, True), "w8sym")],
)
def test_grids_are_written_as_in_recipe_names(grid: Grid, text: str) -> None:
    assert str(grid) == text
