"""Recipes by what one wants, for those who do not know their names yet."""

import re
from typing import Any

from hfquant.recipe import Recipe
from hfquant.recipe_source import presets, read_file

GOALS = {
    "balanced": "gptq-w4g64",
    "smallest": "gptq-w3g64",
    "safest": "gptq-w8",
    "quickest to make": "rtn-w4g64",
}
BY_NAME = "by name"
AMOUNTS = {"a size": "fit 2.5 GB", "a maximum loss": "lose 1%"}  # goals that are named by how much, and an example


def asked(text: str) -> str | dict[str, Any]:
    """What is in the field of the recipe: a recipe's name, or a budget: `fit 2.5 GB`, `lose 1%`."""
    found = re.fullmatch(r"\s*(fit|lose)\s+(.+?)\s*", text)
    if found is None:
        return text
    goal = "fit" if found[1] == "fit" else "max_loss"
    return {"name": "gptq", "budget": {goal: found[2]}}


def names() -> list[tuple[str, str]]:
    """(label, name) of every preset, but for those that train: they need a text, and hours."""
    return [(name, name) for name in presets() if not Recipe.parse(name).trains]


def describe(name: str) -> str:
    """What a preset is for, or how a goal is named; nothing for other names."""
    if not isinstance(asked(name), str):
        return "The bits of every layer are chosen. Type how much: `fit 300 MB`, or `lose 2%` of perplexity at most."
    found = presets().get(name)
    return "" if found is None else str(read_file(found).get("description", ""))
