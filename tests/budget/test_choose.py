"""The choice is the best there is, and never over what is allowed."""

import random
from dataclasses import replace
from itertools import pairwise, product

import pytest

from hfquant.budget.choose import Unit, frontier, solve, total, units
from hfquant.budget.decide import decide
from hfquant.budget.table import Option, Row, Table
from hfquant.errors import RecipeError
from hfquant.recipe import GridSpec, Recipe


def made(seed: int, layers: int, options: int = 5) -> list[Row]:
    """Rows with random bytes and losses; the more bytes, the less is mostly lost."""
    draw = random.Random(seed)
    found = []
    for i in range(layers):
        weights, scale = draw.choice([1, 4, 16]) * 1000, 10 ** draw.uniform(-4, 0)
        some = [
            Option(GridSpec(bits=bits, group_size=64), weights * bits // 8 + draw.randrange(300), weights * bits // 8,
                   scale * 4.0**-bits * draw.uniform(0.5, 2), draw.uniform(1e-6, 1e-5) * bits)
            for bits in range(2, 2 + options)
        ]  # fmt: skip
        found.append(
            Row(
                f"layer{i}",
                "linear",
                weights,
                f"block{i // 2}",
                (*some, Option(None, 2 * weights, 2 * weights, 0.0, 2e-4)),
            )
        )
    return found


def brute(some: list[Unit], least: str, name: str, limit: float) -> float:
    """The least there is, by trying everything."""
    choices = product(*(range(len(unit.nbytes)) for unit in some))
    return min((total(some, c, least) for c in choices if total(some, c, name) <= limit), default=float("inf"))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("together", [False, True])
def test_as_good_as_trying_everything(seed: int, together: bool) -> None:
    some = units(made(seed, 6, options=3), together)
    low, high = (sum(pick(unit.nbytes) for unit in some) for pick in (min, max))
    for share in (0.1, 0.4, 0.8):
        room = int(low + share * (high - low))
        best = brute(some, "loss", "nbytes", room)
        got = solve(some, "loss", {"nbytes": room})
        assert total(some, got, "nbytes") <= room
        assert total(some, got, "loss") == pytest.approx(best, rel=2e-4, abs=1e-12)
        small = solve(some, "nbytes", {"loss": best * 1.0001})
        assert total(some, small, "loss") <= best * 1.0001
        assert total(some, small, "nbytes") == pytest.approx(brute(some, "nbytes", "loss", best * 1.0001), rel=2e-4)


@pytest.mark.parametrize("seed", range(40))
def test_never_over_and_close_below(seed: int) -> None:
    some = units(made(seed, 60), together=seed % 2 == 0)
    low, high = (sum(pick(unit.nbytes) for unit in some) for pick in (min, max))
    room = int(low + random.Random(seed).uniform(0.02, 0.6) * (high - low))
    chosen = solve(some, "loss", {"nbytes": room})
    assert 0.99 * room < total(some, chosen, "nbytes") <= room


def test_layers_with_one_input_get_one_grid() -> None:
    rows = made(3, 8)
    some = units(rows, together=True)
    assert [len(unit.rows) for unit in some] == [2, 2, 2, 2]
    chosen = solve(some, "loss", {"nbytes": sum(unit.nbytes[len(unit.nbytes) // 2] for unit in some)})
    for unit, i in zip(some, chosen, strict=True):
        assert len({option.name for option in unit.options[i]}) == 1


def test_a_layer_without_a_choice_leaves_the_others_theirs() -> None:
    rows = made(3, 4)
    pinned = replace(rows[0], options=(Option(GridSpec(bits=8, group_size=128), 900, 800, 0.1),))
    some = units([pinned, *rows[1:]], together=True)
    assert [len(unit.rows) for unit in some] == [1, 1, 2]
    assert len(some[1].options) > 1


def test_uniform_sizes_count_what_has_no_choice() -> None:
    rows = made(3, 4)
    pinned = replace(rows[0], options=(Option(GridSpec(bits=8, group_size=64), 7000, 6000, 0.5),))
    table = Table((pinned, *rows[1:]), rest=100, original=10**6)
    found = decide(table, Recipe.parse({"budget": {"fit": 10**5}})).uniform
    assert found
    for name, nbytes, loss in found:
        others = [next(o for o in row.options if o.name == name) for row in rows[1:]]
        assert nbytes == 100 + 7000 + sum(o.nbytes for o in others)
        assert loss == pytest.approx(0.5 + sum(o.loss for o in others))


def test_speed_is_minimized_within_two_limits() -> None:
    some = units(made(7, 8), together=False)
    room, bound = (
        sum(sorted(unit.nbytes)[len(unit.nbytes) // 2] for unit in some),
        sum(max(unit.loss) for unit in some) / 3,
    )
    chosen = solve(some, "seconds", {"nbytes": room, "loss": bound})
    assert total(some, chosen, "nbytes") <= room
    assert total(some, chosen, "loss") <= bound
    others = solve(some, "loss", {"nbytes": room})
    assert total(some, chosen, "seconds") <= total(some, others, "seconds")


def test_what_cannot_be_is_said() -> None:
    some = units(made(1, 4), together=False)
    with pytest.raises(RecipeError, match="no choice of grids stays within nbytes 10"):
        solve(some, "loss", {"nbytes": 10})


def test_the_frontier_falls_and_the_best_choice_lies_on_it() -> None:
    some = units(made(5, 30), together=False)
    points = frontier(some)
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(points))
    assert points[0][0] == sum(min(unit.nbytes) for unit in some)
    assert points[-1][1] == pytest.approx(0.0, abs=1e-9)
    for nbytes, loss in points[:: max(1, len(points) // 8)]:
        best = solve(some, "loss", {"nbytes": nbytes})
        assert total(some, best, "loss") <= loss * (1 + 2e-4) + 1e-9


def test_beaten_options_are_left_out() -> None:
    good, bad = (Option(GridSpec(bits=b, group_size=64), 100 * b, 90 * b, 0.1 if b == 3 else 0.2) for b in (3, 4))
    (unit,) = units([Row("a", "linear", 10, "a", (good, bad))], together=False)
    assert [option.name for (option,) in unit.options] == [good.name]
