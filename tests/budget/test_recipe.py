"""`budget:` in recipes: what it may say, and what it turns into."""

from pathlib import Path

import pytest

from hfquant import HfQuantConfig
from hfquant.budget.decide import as_recipe
from hfquant.budget.table import Option, Row
from hfquant.cli import goals
from hfquant.errors import RecipeError
from hfquant.recipe import GridSpec, Recipe
from hfquant.recipe_budget import read_share


def test_sizes_and_shares_are_read() -> None:
    assert Recipe.parse({"budget": {"fit": "2.5GB"}}).budget.fit == 2_500_000_000  # type: ignore[union-attr]
    assert Recipe.parse({"budget": {"max_loss": "1%"}}).budget.max_loss == 0.01  # type: ignore[union-attr]
    assert (read_share("0.5 %"), read_share("0.02")) == (0.005, 0.02)
    with pytest.raises(ValueError, match="cannot read `much` as a share"):
        read_share("much")


def test_a_budget_alone_is_a_recipe() -> None:
    recipe = Recipe.parse({"budget": {"average_bits": 3}})
    assert [step.method for step in recipe.steps] == ["gptq"]
    assert recipe.needs_calibration
    assert not recipe.budget.with_ends  # type: ignore[union-attr]
    assert Recipe.parse({"steps": [{"method": "rtn"}], "budget": {"fit": "1GB"}}).needs_calibration
    again = Recipe.parse(recipe.model_dump(mode="json"))
    assert again == recipe


def test_another_goal_leaves_what_may_be_chosen_from(tmp_path: Path) -> None:
    own = {"fit": "1GB", "bits": [3, 4], "groups": [64], "together": True, "sparsity": ["2:4", 0.5], "ranks": [8, 4]}
    (tmp_path / "own.yaml").write_text(Recipe.parse({"budget": own}).to_yaml())
    recipe = str(tmp_path / "own.yaml")
    for changed in (
        goals.with_goal(recipe, None, average_bits=3.5, fit=None),
        HfQuantConfig(recipe, average_bits=3.5).recipe,
    ):
        budget = changed.budget
        assert budget is not None
        assert (budget.fit, budget.average_bits) == (None, 3.5)
        assert (budget.bits, budget.groups, budget.together) == ((3, 4), (64,), True)
        assert (budget.sparsity, budget.ranks) == (("2of4", 0.5), (4, 8))


def test_recipes_without_a_budget_keep_their_hash() -> None:
    assert Recipe.parse("gptq-w4g64").hash == "344bdf7c7ea3d3cb"


MISTAKES = [
    ({"fit": "1GB", "average_bits": 3}, "`fit` and `average_bits` are two goals"),
    ({}, "it names no goal"),
    ({"fit": "much"}, "cannot read `much` as a size"),
    ({"fit": "1GB", "within": "2GB"}, "`within` is for `fastest`"),
    ({"fit": "1GB", "bits": [1, 4]}, "widths are 2 to 8 bit"),
    ({"fit": "1GB", "groups": [0]}, "a group has at least one column"),
    ({"max_loss": 3}, "should be less than 1"),
    ({"fit": "1GB", "sparsity": [1.5]}, "lies between 0 and 1, not 1.5"),
    ({"fit": "1GB", "sparsity": ["half"]}, "a pattern is written `2of4`"),
    ({"fit": "1GB", "ranks": [0]}, "a rank is at least 1"),
    ({"fitt": "1GB"}, "unknown key `fitt`"),
]


@pytest.mark.parametrize(("budget", "text"), MISTAKES, ids=[text[:24] for _, text in MISTAKES])
def test_mistakes(budget: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        Recipe.parse({"budget": budget})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            {"steps": [{"method": "sparsegpt", "sparsity": 0.5}], "grid": "w16"},
            "step `sparsegpt` says the same for all",
        ),
        ({"format": "gptq"}, "format `gptq` cannot mix grids"),
        ({"format": "compressed_tensors"}, "format `compressed_tensors` cannot mix grids"),
    ],
)
def test_recipes_that_leave_nothing_to_choose(data: dict[str, object], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        Recipe.parse({"budget": {"fit": "1GB"}} | data)


def test_the_result_is_an_ordinary_recipe() -> None:
    recipe = Recipe.parse({"name": "gptq", "budget": {"fit": "1GB"}, "overrides": {"*.router": None}})
    grids = [GridSpec(bits=3, group_size=64, symmetric=False), GridSpec(bits=4, group_size=32), None]
    rows = [Row(f"a.{i}", "linear", 100 - i, "x", ()) for i in range(3)]
    chosen = [(row, Option(grid, 1, 1, 0.0)) for row, grid in zip(rows, grids, strict=True)]
    made = as_recipe(recipe, [*chosen, (Row("table", "embedding", 900, "table", ()), Option(grids[1], 1, 1, 0.0))])
    assert made.budget is None
    assert made.name == "gptq within 1 GB"
    assert made.grid == grids[0]
    assert made.grid_for("a.0") == grids[0]
    assert made.grid_for("a.1") == grids[1]
    assert made.grid_for("a.2") is None
    assert made.grid_for("b.router") is None
    assert made.grid_for("table", "embedding") == grids[1]
    assert Recipe.parse(made.model_dump(mode="json")) == made
    with pytest.raises(RecipeError, match="within this loss no layer can be compressed"):
        as_recipe(recipe, [(rows[0], Option(None, 1, 1, 0.0))])
