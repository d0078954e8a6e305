"""How much SparseGPT prunes, where, and what it does with layers and options that are not as they should be."""

from dataclasses import replace

import pytest
import torch

from hfquant.errors import RecipeError
from hfquant.methods._mask import _all_but
from hfquant.methods._refit import least_squares
from hfquant.methods.sparsegpt import Method
from hfquant.recipe_parts import Step
from hfquant.tensors.encoding import Encoding, Sparsity
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer
from tests.methods.test_gptq_crosscheck import dead, layer
from tests.methods.test_sparsegpt import DENSE, TEXTBOOK, mask, prune

ALL = [TEXTBOOK, {"admm": 0}, {}, {"joint": True}, {"joint": True, **TEXTBOOK}]
NAMES = ["textbook", "refitted", "best", "joint", "one pass"]


@pytest.mark.parametrize("options", ALL, ids=NAMES)
@pytest.mark.parametrize("in_features", [96, 100, 37, 7])
@pytest.mark.parametrize("pattern", ["2of4", "4of8", "1of4", "7of8", "3of5"])
def test_exactly_n_of_every_m(pattern: str, in_features: int, options: dict[str, object]) -> None:
    n, m = map(int, pattern.split("of"))
    done = prune(layer(10, in_features), Grid(4, 32), pattern=pattern, **options)
    for first in range(0, in_features, m):
        part = mask(done)[:, first : first + m]
        assert bool((part.sum(1) == min(n, part.shape[1])).all())
    assert done.pattern == ((n, m) if in_features % m == 0 else None)
    assert bool((done.effective[~mask(done)] == 0).all())


@pytest.mark.parametrize("options", ALL, ids=NAMES)
@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 2 / 3, 0.95])
@pytest.mark.parametrize("shape", [(7, 33), (24, 300), (1, 1)])
def test_the_share_is_exact(shape: tuple[int, int], sparsity: float, options: dict[str, object]) -> None:
    done = prune(layer(*shape) if shape != (1, 1) else Layer(name="l", W=torch.ones(1, 1), H=torch.ones(1, 1)),
                 Grid(4, 32), sparsity=sparsity, **options)  # fmt: skip
    total = shape[0] * shape[1]
    assert int(mask(done).sum()) == total - round(sparsity * total)
    assert bool((done.effective[~mask(done)] == 0).all())
    assert done.pattern is None


def test_blocks_of_the_sweep_share_alike() -> None:
    kept = mask(prune(layer(10, 300), sparsity=0.3, block=50, **TEXTBOOK))
    assert [int(part.sum()) for part in kept.split(50, 1)] == [350] * 6


@pytest.mark.parametrize("shape", [(7, 33), (8, 32)])
@pytest.mark.parametrize("kind", [{"sparsity": 0.37}, {"pattern": "2of4"}, {"pattern": "2:4"}], ids=str)
def test_what_is_stored_is_known_beforehand(kind: dict[str, object], shape: tuple[int, int]) -> None:
    method = Method(**kind)
    expected = method.encodes(Encoding(DENSE), shape)
    assert method(layer(*shape), DENSE, torch.float16).stored(torch.float16).encoding == expected
    assert (expected.sparsity == Sparsity(2, 4)) == ("pattern" in kind and shape[1] == 32)


def test_layers_can_have_ratios_of_their_own() -> None:
    method = Method(sparsity=0.5, ratios={"*.down_proj": 0.25, "*.3.*": 0.75})
    shares = {"h.3.down_proj.weight": 0.25, "h.3.up_proj": 0.75, "h.4.up_proj.weight": 0.5}
    for name, share in shares.items():
        done = method(replace(layer(8, 40), name=name), DENSE, torch.float16)
        assert int((~mask(done)).sum()) == 320 * share


@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"pattern": "2of4"}], ids=str)
def test_a_layer_can_be_left_unpruned(kind: dict[str, object]) -> None:
    given = replace(layer(8, 40), name="h.0.down_proj.weight")
    done = Method(**kind, ratios={"*.down_proj": 0})(given, DENSE, torch.float16)
    assert done.mask is None
    assert torch.equal(done.effective, given.W)
    rounded = Method(**kind, ratios={"*.down_proj": 0}, joint=True)(given, Grid(4, 40), torch.float16)
    assert rounded.mask is None
    assert rounded.Q is not None
    assert not Method(**kind, ratios={"*.down_proj": 0}).rowwise  # its neighbours are pruned


@pytest.mark.parametrize("options", [{}, {"admm": 0}, {"joint": True}], ids=["best", "refitted", "joint"])
def test_a_sensitive_layer_is_pruned_less(options: dict[str, object]) -> None:
    given, grid = layer(24, 96), Grid(4, 32)
    whole = prune(given, sparsity=0.8, **options)
    assert whole.error() > 0.2
    done = prune(given, grid, sparsity=0.8, max_error=0.1, **options)
    assert 0.05 < replace(done, Q=None).error() <= 0.1
    assert 0.1 < 1 - mask(done).float().mean() < 0.8
    assert any("instead of 80.0%" in note for note in done.notes)
    assert (done.Q is None) == ("joint" not in options)
    assert torch.equal(mask(prune(given, sparsity=0.8, max_error=0.9, **options)), mask(whole))


def test_a_layer_that_stands_no_pruning_is_left_as_it_is() -> None:
    done = prune(layer(24, 96), sparsity=0.8, max_error=1e-6)
    assert done.mask is None
    assert torch.equal(done.effective, done.W)
    assert any(note.startswith("0.0% pruned") for note in done.notes)
    rounded = prune(layer(24, 96), Grid(4, 32), sparsity=0.8, max_error=1e-6, joint=True)
    assert rounded.mask is None
    assert rounded.Q is not None


@pytest.mark.parametrize("options", ALL, ids=NAMES)
@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"pattern": "2of4"}], ids=str)
@pytest.mark.parametrize(
    "ill", ["dead columns", "all dead", "few tokens", "missing", "infinite", "indefinite", "zero W"]
)
def test_layers_in_a_bad_state(ill: str, kind: dict[str, object], options: dict[str, object]) -> None:
    given = layer(16, 64, tokens=20 if ill == "few tokens" else 512)
    assert given.H is not None
    unusable = ill in ("missing", "infinite", "indefinite")
    given = {
        "dead columns": lambda: dead(given, [0, 5, 31, 40, 41]),
        "all dead": lambda: replace(given, H=torch.zeros(64, 64)),
        "few tokens": lambda: given,
        "missing": lambda: replace(given, H=None),
        "infinite": lambda: replace(given, H=given.H.clone().fill_diagonal_(torch.inf)),
        "indefinite": lambda: replace(given, H=-torch.eye(64)),
        "zero W": lambda: replace(given, W=torch.zeros(16, 64)),
    }[ill]()  # fmt: skip
    done = prune(given, Grid(4, 32), **kind, **options)
    assert int(mask(done).sum()) == 16 * 32
    assert bool(torch.isfinite(done.effective).all())
    assert bool((done.effective[~mask(done)] == 0).all())
    assert any("smallest weights" in note for note in done.notes) == unusable
    assert len(set(done.notes)) == len(done.notes)
    if unusable and "joint" not in options:
        assert given.W[mask(done)].abs().mean() > 1.5 * given.W[~mask(done)].abs().mean()
        assert torch.equal(done.effective, given.W * mask(done))


def test_a_singular_hessian_is_damped() -> None:
    done = prune(layer(16, 64, tokens=20), sparsity=0.5, damp=0.0)
    assert any("damping raised" in note for note in done.notes)
    assert done.error() < 0.5


def test_silent_columns_are_not_taken_for_useless() -> None:
    """A channel that was silent on the calibration text is not silent on all text."""
    columns = [0, 5, 31, 40]
    done = prune(dead(layer(32, 96), columns), sparsity=0.5)
    assert 0.2 < mask(done)[:, columns].float().mean() < 0.8


def test_inputs_are_left_alone() -> None:
    given = layer(16, 64)
    assert given.H is not None
    W, H = given.W.clone(), given.H.clone()
    prune(given, Grid(4, 32), pattern="2of4", joint=True)
    assert torch.equal(given.W, W)
    assert torch.equal(given.H, H)


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    given = layer(32, 96)
    assert given.H is not None
    one, other = (prune(replace(given, H=given.H * factor), sparsity=0.5) for factor in (1, 2.0**10))
    assert torch.equal(mask(one), mask(other))
    torch.testing.assert_close(one.effective, other.effective)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give either"),
        ({"sparsity": 0.5, "pattern": "2of4"}, "give either"),
        ({"sparsity": 0.0}, "greater than 0"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"pattern": "4of4"}, "not 4 of 4"),
        ({"pattern": "5:4"}, "not 5 of 4"),
        ({"pattern": "0of4"}, "not 0 of 4"),
        ({"pattern": "2of4000"}, "not 2 of 4000"),
        ({"pattern": "half"}, "is written `2of4`"),
        ({"pattern": 124}, "write `2of4`"),  # what YAML makes of 2:4
        ({"pattern": True}, "write `2of4`"),
        ({"pattern": "2of4", "ratios": {"*": 0.5}}, "`ratios` and `max_error` go with `sparsity`"),
        ({"pattern": "2of4", "max_error": 0.1}, "`max_error` go with"),
        ({"sparsity": 0.5, "max_error": 0.0}, "greater than 0"),
        ({"sparsity": 0.5, "ratios": {"*": 1.5}}, "between 0 and 1, not 1.5"),
        ({"sparsity": 0.5, "prune": 3}, "unknown key `prune`"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError) as error:
        Step.model_validate({"method": "sparsegpt", **options})
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("2of4", {"pattern": "2of4"}),
        ("50", {"sparsity": 0.5}),
        ("62.5", {"sparsity": 0.625}),
        ("4of8", {"pattern": "4of8"}),
    ],
)
def test_shorthand(what: str, options: dict[str, object]) -> None:
    assert Method.shorthand(what) == options
    Method(**options)


@pytest.mark.parametrize("what", ["0.5", "100", "half", "4of2", "of4", "nan"])
def test_shorthand_that_means_nothing(what: str) -> None:
    with pytest.raises(ValueError, match=r"2of4|not 4 of 2"):
        Method.shorthand(what)


def test_a_row_that_overflows_costs_the_others_nothing() -> None:
    X = torch.randn(64, 200)
    H, W = X @ X.T / 200 + 0.01 * torch.eye(64), torch.randn(64, 8)
    keep = torch.rand(64, 8) > 0.5
    alone, left = least_squares(W * keep, W, keep, H, 12)
    W[:, 3] *= 1e30  # its squares are not float32
    beside, left_beside = least_squares(W * keep, W, keep, H, 12)
    rest = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(beside[:, rest], alone[:, rest])
    torch.testing.assert_close(left_beside[rest], left[rest])
    assert torch.equal(beside[:, 3], (W * keep)[:, 3])


@pytest.mark.parametrize("lowest", [1, 2, 3, 5])
def test_exactly_so_many_are_pruned_whatever_the_scores(lowest: int) -> None:
    """Those that are not numbers go last."""
    scores = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), float("nan"), 2.0]])
    keep = _all_but(scores, lowest)
    assert int(keep.sum()) == 6 - lowest
    assert not keep[0, 0]
    assert bool(keep[1, 1])
