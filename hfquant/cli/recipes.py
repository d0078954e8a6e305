"""`hfquant recipes`"""

from typing import Annotated

import typer

from . import engine
from .arguments import Json, Set
from .output import print_json, print_table


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A preset, any other name, or a file.", show_default=False),
    ] = None,
    changes: Set = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipe files.")] = False,
    as_json: Json = False,
) -> None:
    """List the presets, or print one recipe in full as YAML, ready to be changed and used.

    A name is `<method>-w<bits>g<group>`; any combination can be written that way, `gptq-w5g32` for example.
    Without `g<group>` there is one scale per output channel; `sym` or `asym` at the end chooses the symmetry;
    `w4a8` rounds activations too; `+` joins steps: `gptq-w3g64+lorc-r8`.
    """
    if schema:
        from ..recipe_schema import json_schema

        print_json(json_schema())
    elif name is not None:
        recipe = engine.read_recipe(name, changes)
        if as_json:
            print_json(recipe.model_dump(mode="json"))
        else:
            print(recipe.to_yaml(), end="")
    else:
        _list(as_json)


def _list(as_json: bool) -> None:
    from ..recipe_source import presets, read_file

    found = {name: str(read_file(path)["description"]) for name, path in presets().items()}
    if as_json:
        print_json(found)
    else:
        print_table(["recipe", "description"], list(found.items()))
