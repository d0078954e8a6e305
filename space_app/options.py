"""The fields of a recipe as a form, made from the recipe's own schema: a new option appears here by itself."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from hfquant import methods
from hfquant.recipe import Recipe
from hfquant.recipe_parts import Calibration, Gate, GridSpec

TOP = ("format", "dtype")


@dataclass(frozen=True)
class Field:
    """One option.  key: as `hfquant compress --set` takes it.

    kind: "bool", "choice", "number", "text", or "maybe": a number or nothing.
    """

    key: str
    label: str
    info: str
    kind: str
    value: Any
    choices: tuple[str, ...] = ()

    def read(self, given: Any) -> Any:
        """What was typed, as the recipe's type."""
        if self.kind == "number" and isinstance(given, float) and isinstance(self.value, int):
            return int(given) if given.is_integer() else given  # the recipe says what is wrong with half a group
        if self.kind in ("text", "maybe") and isinstance(given, str):
            text = given.strip()
            if text in ("", "null"):
                return None
            return text if self.kind == "text" else yaml.safe_load(text)
        return given


def fields(recipe: Recipe) -> dict[str, list[Field]]:
    """Title of a group -> its options, with the values that this recipe has."""
    found = {}
    for i, step in enumerate(recipe.steps):
        schema = methods.load(step.method).model_json_schema()
        group = list(_group(f"steps.{i}", schema["properties"], step.options))
        if group:
            found[step.method if step.method not in found else f"{step.method} ({i + 1})"] = group
    if recipe.grid.bits != 16 and recipe.budget is None:
        found["numbers"] = list(_group("grid", GridSpec.model_json_schema()["properties"], recipe.grid.model_dump()))
    if recipe.needs_calibration:
        shown = {k: v for k, v in Calibration.model_json_schema()["properties"].items() if k != "source"}
        found["calibration"] = list(_group("calibration", shown, recipe.calibration.model_dump()))
    found["quality gate"] = list(_group("gate", Gate.model_json_schema()["properties"], recipe.gate.model_dump()))
    top = {name: Recipe.model_json_schema()["properties"][name] for name in TOP}
    found["checkpoint"] = list(_group("", top, recipe.model_dump()))
    return found


def changes(recipe: Recipe, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The changes to a recipe that make its options these, as `key=value`."""
    known = {field.key: field for group in fields(recipe).values() for field in group}
    new = {key: known[key].read(value) for key, value in values.items() if key in known}
    return tuple(f"{key}={json.dumps(value)}" for key, value in new.items() if value != known[key].value)


def _group(prefix: str, properties: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Field]:
    for name, schema in properties.items():
        kind, choices = _kind(schema)
        value = values.get(name, schema.get("default"))
        if kind is not None:
            key = f"{prefix}.{name}" if prefix else name
            yield Field(key, name.replace("_", " "), str(schema.get("description", "")), kind, value, choices)


def _kind(schema: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """How an option is asked for; None for what has no simple form (it can be set in a recipe given as a whole)."""
    if "enum" in schema:
        return "choice", tuple(str(choice) for choice in schema["enum"])
    types = [option.get("type") for option in schema.get("anyOf", [schema])]
    if "boolean" in types:
        return ("bool", ()) if "null" not in types else (None, ())
    if any(kind in types for kind in ("integer", "number")):
        return ("maybe" if "null" in types else "number"), ()
    return ("text", ()) if "string" in types else (None, ())
