"""A size or a loss that somebody names is a recipe with a budget, and is judged before anything is started."""

from typing import Any

import pytest

from hfquant.conversion import tasks
from hfquant.conversion.facts import Preview
from hfquant.conversion.request import Request
from hfquant.errors import RecipeError
from hfquant.recipe import Recipe
from space_app import catalogue, convert, options, views


def wish(recipe: str, values: dict[str, Any] | None = None) -> Request:
    given = convert.request("me/model", recipe, values or {}, "me", "", "public", False, False, False,
                            next(iter(convert.EXECUTORS)), None, None)  # fmt: skip
    return Request.parse(given)


@pytest.mark.parametrize(
    ("text", "goal", "value", "name"),
    [
        ("fit 2.5 GB", "fit", 2_500_000_000, "model-fit-2.5GB"),
        (" fit  300MB ", "fit", 300_000_000, "model-fit-300MB"),
        ("lose 1%", "max_loss", 0.01, "model-lose-1-percent"),
        ("lose 0.5 %", "max_loss", 0.005, "model-lose-0.5-percent"),
    ],
)
def test_what_is_named_is_a_budget(text: str, goal: str, value: float, name: str) -> None:
    found = wish(text)
    budget = found.chosen().budget
    assert budget is not None
    assert getattr(budget, goal) == value
    assert found.target == f"me/{name}"


def test_examples_are_goals_and_names_stay_names() -> None:
    for text in catalogue.AMOUNTS.values():
        assert Recipe.parse(catalogue.asked(text)).budget is not None
        assert "Type how much" in catalogue.describe(text)
    for text in (*catalogue.GOALS.values(), "gptq-w5g32"):
        assert catalogue.asked(text) == text


def test_mistakes_are_said() -> None:
    with pytest.raises(RecipeError, match="cannot read `much` as a size"):
        wish("fit much")
    with pytest.raises(RecipeError, match="less than 1"):
        wish("lose 300%")


def test_options_are_those_of_the_method_and_not_of_a_grid() -> None:
    recipe = Recipe.parse(catalogue.asked("fit 1 GB"))
    groups = options.fields(recipe)
    assert "numbers" not in groups
    assert options.changes(recipe, {"steps.0.damp": 0.02}) == ("steps.0.damp=0.02",)
    assert wish("fit 1 GB", {"steps.0.damp": 0.02}).chosen().steps[0].options["damp"] == 0.02


def laid_out(recipe: str, built: Any) -> dict[str, Any]:
    source = tasks.open_source(built("llama"))
    tensors = {name: [tasks_dtype(info.dtype), list(info.shape)] for name, info in source.tensors.items()}
    question = {"name": "me/model", "config": source.config.to_dict(), "tensors": tensors, "memory": 10**10,
                "recipe": Recipe.parse(catalogue.asked(recipe)).model_dump(mode="json")}  # fmt: skip
    return tasks._layout(question)


def tasks_dtype(dtype: Any) -> str:
    return next(name for name, known in tasks.DTYPES.items() if known == dtype)


def test_before_it_starts_it_is_known_whether_it_can_be_met(built: Any) -> None:
    assert laid_out("fit 150 kB", built)["bytes_after"] == 150_000
    least = laid_out("lose 1%", built)["bytes_after"]
    assert 0 < least < 150_000
    with pytest.raises(RecipeError, match=r"fit 20 kB cannot be met: the smallest .* is [\d.]+ kB"):
        laid_out("fit 20 kB", built)
    with pytest.raises(RecipeError, match="asks for nothing"):
        laid_out("fit 1 GB", built)


@pytest.mark.parametrize(("budget", "text"), [({"fit": 5}, "at most **5 B**"), ({"max_loss": 0.1}, "at least **5 B**")])
def test_the_preview_says_how_sure_that_is(budget: dict[str, Any], text: str) -> None:
    empty: dict[str, Any] = dict.fromkeys(Preview.__dataclass_fields__)
    found = Preview(**empty | {"bytes_before": 10, "bytes_after": 5, "recipe": {"budget": budget}, "problems": (),
                               "runtimes": ()})  # fmt: skip
    assert text in views.preview(found)
