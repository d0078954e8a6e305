"""Recipes by what one wants, for those who do not know their names yet."""

from hfquant.recipe import Recipe
from hfquant.recipe_source import presets, read_file

GOALS = {
    "balanced": "gptq-w4g64",
    "smallest": "gptq-w3g64",
    "safest": "gptq-w8",
    "quickest to make": "rtn-w4g64",
}
BY_NAME = "by name"


def names() -> list[tuple[str, str]]:
    """(label, name) of every preset, but for those that train: they need a text, and hours."""
    return [(name, name) for name in presets() if not Recipe.parse(name).trains]


def describe(name: str) -> str:
    """What a preset is for; nothing for other names."""
    found = presets().get(name)
    return "" if found is None else str(read_file(found).get("description", ""))
