"""The form of a recipe's options is the recipe: what is set in it is what will run."""

from typing import Any

import pytest

from hfquant.errors import RecipeError
from hfquant.recipe import Recipe
from hfquant.recipe_source import presets
from space_app import catalogue, options

OTHER = {
    "number": lambda value: value + 1,
    "bool": lambda value: not value,
    "text": lambda value: "x",
    "maybe": lambda value: "1.5",
}


def at(recipe: Recipe, key: str) -> Any:
    found: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else found[part]
    return found


@pytest.mark.parametrize("name", presets())
def test_nothing_changed_is_nothing_to_change(name: str) -> None:
    recipe = Recipe.parse(name)
    groups = options.fields(recipe)
    same = {field.key: field.value for group in groups.values() for field in group}
    assert same
    assert options.changes(recipe, same) == ()
    for key, value in same.items():
        assert at(recipe, key) == value, key


@pytest.mark.parametrize("name", ["gptq-w4g64", "sparsegpt-2of4+gptq-w4g128+lorc-r8", "smoothquant-w8a8"])
def test_each_option_arrives_in_the_recipe(name: str) -> None:
    recipe = Recipe.parse(name)
    arrived = 0
    for group in options.fields(recipe).values():
        for field in group:
            new = field.choices[-1] if field.kind == "choice" else OTHER[field.kind](field.value)
            found = options.changes(recipe, {field.key: new})
            try:
                changed = Recipe.parse(name, found)
            except RecipeError:
                continue  # out of its range: the recipe says so, which the page shows
            assert at(changed, field.key) == field.read(new) != field.value or new == field.value, field.key
            arrived += 1
    assert arrived > 8


def test_empty_switches_a_limit_off() -> None:
    recipe = Recipe.parse("gptq-w4g64")
    assert options.changes(recipe, {"gate.max_ppl_ratio": ""}) == ("gate.max_ppl_ratio=null",)
    assert options.changes(recipe, {"gate.max_ppl_ratio": "2"}) == ("gate.max_ppl_ratio=2",)
    assert options.changes(recipe, {"gate.max_ppl_ratio": "3"}) == ()


def test_numbers_of_a_page_are_whole_where_they_must_be() -> None:
    recipe = Recipe.parse("gptq-w4g64")
    assert options.changes(recipe, {"grid.bits": 3.0}) == ("grid.bits=3",)
    with pytest.raises(RecipeError):
        Recipe.parse("gptq-w4g64", options.changes(recipe, {"grid.bits": 3.5}))


def test_what_is_not_of_this_recipe_is_left_out() -> None:
    """The page may still hold an option of the recipe that was chosen before."""
    assert options.changes(Recipe.parse("rtn-w4g64"), {"steps.0.damp": 0.5}) == ()


def test_goals_are_presets_and_say_what_they_are_for() -> None:
    for name in catalogue.GOALS.values():
        assert catalogue.describe(name)
    assert catalogue.describe("gptq-w5g32") == ""
