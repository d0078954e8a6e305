"""hfquant's GPTQ against a second implementation, and against what the paper claims of it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hfquant.methods.gptq import Method as Gptq
from hfquant.methods.rtn import Method as Rtn
from hfquant.tensors import layer as layers
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer, Quantized
from tests import reference_gptq

TEXTBOOK = {"act_order": False, "static_groups": False, "search": 0, "refine": 0, "damp": 0.01}


def layer(out_features: int = 24, in_features: int = 96, tokens: int = 512, seed: int = 0) -> Layer:
    """Weights and correlated inputs with a few loud channels, as trained layers have them."""
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, in_features, generator=draw) * 0.05
    mix = torch.randn(in_features, in_features, generator=draw) / in_features**0.5
    X = (mix + 0.3 * torch.eye(in_features)) @ torch.randn(in_features, tokens, generator=draw)
    X[:: in_features // 6] *= 6
    return Layer(name="layer", W=W, H=2 / tokens * X @ X.T)


def rounded(given: Layer, grid: Grid) -> Layer:
    scale, zero = grid.fit(given.W)
    return replace(given, Q=Quantized(codes=grid.encode(given.W, scale, zero), scale=scale, zero_point=zero, grid=grid))


def gptq(given: Layer, grid: Grid, **options: object) -> Layer:
    return Gptq(**options)(given, grid, torch.float16)


def result(done: Layer) -> Quantized:
    assert done.Q is not None
    return done.Q


def objective(done: Layer) -> float:
    """tr((W − Ŵ) H (W − Ŵ)ᵀ) in float64"""
    assert done.H is not None
    D = (done.W - done.effective).double()
    return float(((D @ done.H.double()) * D).sum())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 32, 16, 96], ids=["channel", "g32", "g16", "one group"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_same_codes_as_the_papers_equations(bits: int, group_size: int, symmetric: bool) -> None:
    given = layer(seed=bits)
    assert given.H is not None
    grid = Grid(bits, group_size, symmetric)
    ours = result(gptq(given, grid, **TEXTBOOK))
    codes, scale, zero = reference_gptq.gptq(
        given.W, given.H, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=torch.float16
    )
    assert (ours.codes == codes).double().mean() >= 0.999
    assert (ours.scale == scale).double().mean() >= 0.99
    assert (ours.zero_point == zero).double().mean() >= 0.99


def test_same_codes_at_a_width_of_several_blocks() -> None:
    given = layer(8, 320, 1024)
    assert given.H is not None
    ours = result(gptq(given, Grid(4, 64, False), **TEXTBOOK))
    codes, _, _ = reference_gptq.gptq(
        given.W, given.H, bits=4, group_size=64, symmetric=False, scale_dtype=torch.float16
    )
    assert (ours.codes == codes).double().mean() >= 0.999


def test_one_row_is_obq_in_column_order() -> None:
    """OBQ's definition: the free weights are solved for anew after every rounding, no inverse is updated."""
    given, grid = layer(1, 48), Grid(3, -1, True)
    assert given.H is not None
    scale, zero = reference_gptq.minmax(given.W[0], 3, True, torch.float16)

    def code(q: int, w: float) -> tuple[float, float]:
        k = reference_gptq.nearest(w, scale, zero, 3)
        return k, scale * (k - zero)

    H = reference_gptq.damped(given.H, 0.01)
    codes = reference_gptq.obq_row(given.W[0].double(), H, lambda _, free: int(free.nonzero()[0]), code)
    assert result(gptq(given, grid, **TEXTBOOK)).codes[0].tolist() == codes.tolist()


def test_activation_order_is_obq_in_that_order() -> None:
    given, grid = layer(1, 48, seed=3), Grid(3, 16, False)
    assert given.H is not None
    order = torch.argsort(given.H.diagonal(), descending=True, stable=True).tolist()
    fits = [reference_gptq.minmax(given.W[0, a : a + 16], 3, False, torch.float16) for a in range(0, 48, 16)]

    def code(q: int, w: float) -> tuple[float, float]:
        scale, zero = fits[q // 16]
        k = reference_gptq.nearest(w, scale, zero, 3)
        return k, scale * (k - zero)

    codes = reference_gptq.obq_row(
        given.W[0].double(),
        reference_gptq.damped(given.H, 0.01),
        lambda _, free: next(q for q in order if free[q]),
        code,
    )
    done = result(gptq(given, grid, search=0, refine=0))
    assert done.codes[0].tolist() == codes.tolist()


@pytest.mark.parametrize("options", [TEXTBOOK, {}], ids=["textbook", "best"])
@pytest.mark.parametrize("grid", [Grid(b, g, s) for b in (2, 3, 4) for g in (-1, 32) for s in (True, False)], ids=str)
def test_better_than_rounding(grid: Grid, options: dict[str, object]) -> None:
    given = layer(64, 128, 1024)
    ours, nearest = gptq(given, grid, **options), rounded(given, grid)
    assert 0 < objective(ours) < 0.9 * objective(nearest)
    assert ours.error() > 0


@pytest.mark.parametrize("grid", [Grid(2, 32, True), Grid(4, 32, False), Grid(3, -1, False)], ids=str)
def test_uncorrelated_inputs_leave_nothing_to_correct(grid: Grid) -> None:
    given = replace(layer(16, 96), H=torch.eye(96))
    for textbook in ({}, {"act_order": True, "static_groups": True}):
        ours, nearest = result(gptq(given, grid, **(TEXTBOOK | textbook))), result(rounded(given, grid))
        assert torch.equal(ours.codes, nearest.codes)
        assert torch.equal(ours.scale, nearest.scale)
        assert torch.equal(ours.zero_point, nearest.zero_point)


@pytest.mark.parametrize("options", [TEXTBOOK, {}, {"refine": 0}], ids=["textbook", "best", "unrefined"])
@pytest.mark.parametrize("group_size", [-1, 32, 48], ids=["channel", "g32", "g48"])
def test_block_is_speed_only(group_size: int, options: dict[str, object]) -> None:
    given, grid = layer(32, 192, 1024), Grid(4, group_size, False)
    whole = result(gptq(given, grid, **options, block=192)).codes
    for block in (1, 7, 32, 50, 128):
        same = result(gptq(given, grid, **options, block=block)).codes == whole
        assert same.double().mean() >= 0.999, block


@pytest.mark.parametrize("options", [TEXTBOOK, {}], ids=["textbook", "best"])
@pytest.mark.parametrize("pruned", [False, True])
def test_pieces_of_rows_end_as_the_whole(
    pruned: bool, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its own target and its own mask."""
    given, grid = layer(40, 96, 1024), Grid(4, 32, False)
    draw = torch.Generator().manual_seed(1)
    drift = 0.02 * torch.randn(96, 96, generator=draw)
    mask = torch.rand(given.W.shape, generator=draw) < 0.7 if pruned else None
    given = replace(given, C=given.H @ (torch.eye(96) + drift), mask=mask)
    whole = result(gptq(given, grid, **options))
    monkeypatch.setattr(layers, "LEAST_ROWS", 12)
    monkeypatch.setattr(layers, "ELEMENTS", 1)
    assert len(list(given.parts())) == 4
    pieces = result(gptq(given, grid, **options))
    assert (pieces.codes == whole.codes).double().mean() >= 0.999
    assert torch.equal(pieces.zero_point, whole.zero_point)
    torch.testing.assert_close(pieces.scale, whole.scale, rtol=1e-2, atol=0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("in_features", "group_size"), [(100, 32), (33, 32), (97, 64), (7, 128)])
def test_ragged_groups(in_features: int, group_size: int, symmetric: bool) -> None:
    given, grid = layer(16, in_features, 512), Grid(3, group_size, symmetric)
    for options in (TEXTBOOK, {}):
        done = gptq(given, grid, **options)
        Q = result(done)
        assert Q.scale.shape == Q.zero_point.shape == (16, grid.groups(in_features))
        assert torch.isfinite(Q.dequantize()).all()
        assert 0 < objective(done) <= objective(rounded(given, grid))


@pytest.mark.parametrize("options", [TEXTBOOK, {}], ids=["textbook", "best"])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_result_is_on_the_grid(bits: int, options: dict[str, object]) -> None:
    Q = result(gptq(layer(16, 80), Grid(bits, 32, False), **options))
    assert Q.codes.dtype == Q.zero_point.dtype == torch.uint8
    assert Q.scale.dtype == torch.float16
    assert int(Q.codes.max()) <= Q.grid.top
    assert int(Q.zero_point.max()) <= Q.grid.top
    assert torch.isfinite(Q.scale).all()
    assert (Q.scale != 0).all()
    values = Q.dequantize()
    assert torch.equal(Q.grid.decode(Q.grid.encode(values, Q.scale, Q.zero_point), Q.scale, Q.zero_point), values)


def dead(given: Layer, columns: list[int]) -> Layer:
    assert given.H is not None
    H = given.H.clone()
    H[columns, :] = 0
    H[:, columns] = 0
    return replace(given, H=H)


@pytest.mark.parametrize("options", [{"refine": 0}, {}], ids=["unrefined", "best"])
def test_dead_columns_keep_their_rounded_originals(options: dict[str, object]) -> None:
    """A channel that was silent on the calibration text is not silent on all text: its weights stay."""
    columns = [0, 5, 31, 40]
    given, grid = dead(layer(16, 96), columns), Grid(4, 32, False)
    Q = result(gptq(given, grid, **options))
    nearest = grid.encode(given.W, Q.scale, Q.zero_point)
    assert torch.equal(Q.codes[:, columns], nearest[:, columns])
    assert Q.dequantize()[:, columns].abs().sum() > 0


def test_all_columns_dead() -> None:
    given, grid = layer(8, 32), Grid(4, 16, True)
    done = gptq(replace(given, H=torch.zeros(32, 32)), grid)
    Q = result(done)
    assert torch.equal(Q.codes, grid.encode(given.W, Q.scale, Q.zero_point))


def _spoilt(value: float) -> Tensor:
    H = torch.eye(64)
    H[3, 3] = value
    return H


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "H",
    [_spoilt(float("nan")), _spoilt(float("inf")), -torch.eye(64), None],
    ids=["nan", "infinite", "indefinite", "missing"],
)
def test_an_unusable_hessian_leaves_clipped_rounding_and_says_so(H: Tensor | None, symmetric: bool) -> None:
    given, grid = replace(layer(16, 64), H=H), Grid(3, 32, symmetric)
    done = gptq(given, grid)
    assert done.notes == ("no usable Hessian: rounded to nearest",)
    ours, searched = result(done), result(Rtn()(replace(given, H=None), grid, torch.float16))
    for field in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(ours, field), getattr(searched, field))
    assert not torch.equal(ours.scale, result(rounded(given, grid)).scale), "ranges are searched"


@pytest.mark.parametrize("rank", [40, 80])
@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(3, -1, True)], ids=str)
def test_a_hessian_that_float32_cannot_factor(grid: Grid, rank: int) -> None:
    """Inputs that span 40 or 80 of 96 dimensions, exactly, and next to no damping."""
    draw = torch.Generator().manual_seed(0)
    X = torch.randint(-8, 9, (96, rank), generator=draw).double()
    W, H = torch.randn(24, 96, generator=draw) * 0.05, (X @ X.T).float()
    assert torch.equal(H.double(), X @ X.T)
    done = gptq(Layer(name="layer", W=W, H=H), grid, **TEXTBOOK | {"damp": 1e-7})
    assert not done.notes, "the damping was enough"
    codes, _, _ = reference_gptq.gptq(
        W, H, bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric, scale_dtype=torch.float16, damp=1e-7
    )
    assert (result(done).codes == codes).double().mean() >= 0.999


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_fewer_tokens_than_columns(damp: float) -> None:
    given, grid = layer(16, 128, tokens=40), Grid(4, 32, False)
    done = gptq(given, grid, damp=damp)
    assert not any("rounded to nearest" in note for note in done.notes)
    assert any("damping raised" in note for note in done.notes) == (damp == 0.0)
    assert 0 < objective(done) < objective(rounded(given, grid))


@pytest.mark.parametrize("grid", [Grid(b, g, s) for b in (2, 3, 4) for g in (-1, 32) for s in (True, False)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_refinement_never_raises_the_objective(seed: int, grid: Grid) -> None:
    given = layer(48, 160, 1024, seed)
    after = [objective(gptq(given, grid, refine=rounds)) for rounds in (0, 1, 2, 5)]
    assert after == sorted(after, reverse=True)
    assert after[1] < after[0]


def test_options_lower_the_objective_on_average() -> None:
    """Order, search and refinement: on one layer a greedy step may lose, over eight none does."""
    ladder = [TEXTBOOK, {"search": 0, "refine": 0}, {"refine": 0}, {}]
    layers, grid = [layer(32, 128, 1024, seed) for seed in range(8)], Grid(3, 32, False)
    totals = [sum(objective(gptq(each, grid, **options)) for each in layers) for options in ladder]
    assert totals == sorted(totals, reverse=True)


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    given, grid = layer(32, 96), Grid(4, 32, False)
    assert given.H is not None
    scaled = replace(given, H=given.H * 2.0**10)
    assert torch.equal(result(gptq(given, grid)).codes, result(gptq(scaled, grid)).codes)


def test_inputs_are_left_alone() -> None:
    given = layer(16, 64)
    W, H = given.W.clone(), given.H.clone() if given.H is not None else torch.zeros(0)
    gptq(given, Grid(3, 32, False))
    assert torch.equal(given.W, W)
    assert given.H is not None
    assert torch.equal(given.H, H)


def shifted(seed: int = 0) -> tuple[Layer, Tensor, Tensor]:
    """A layer whose inputs differ from the original model's, and both inputs: (layer, X, X̃)."""
    draw = torch.Generator().manual_seed(seed)
    given = layer(32, 64, 2048, seed)
    mix = torch.randn(64, 64, generator=draw) / 8
    original = mix @ torch.randn(64, 2048, generator=draw)
    X = original + 0.2 * torch.randn(64, 2048, generator=draw) + 0.1 * original.roll(1, 0)
    return replace(given, H=2 / 2048 * X @ X.T, C=2 / 2048 * original @ X.T), X, original


def test_matching_the_original_stream_lowers_the_error_against_it() -> None:
    given, X, original = shifted()
    wanted = given.W @ original
    errors = [
        float((gptq(given, Grid(4, 32, False), match_original=beta).effective @ X - wanted).norm())
        for beta in (0.0, 0.5, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)


def test_matching_without_a_second_stream_changes_nothing() -> None:
    given = layer(16, 64)
    plain, matched = gptq(given, Grid(4, 32, False)), gptq(given, Grid(4, 32, False), match_original=1.0)
    assert torch.equal(result(plain).codes, result(matched).codes)
