"""Where a recipe's plain data comes from: a file, a preset, a shorthand; and `key=value` changes to it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from . import methods
from .errors import RecipeError
from .recipe_errors import unknown_key
from .recipe_names import read_grid, read_name

PRESETS = Path(__file__).parent / "recipes"


class Loader(yaml.SafeLoader):
    """YAML where `1e-2` is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line} is not YAML: {problem or error}", "quote values such as '*' or '@'") from None


def presets() -> dict[str, Path]:
    """Name -> file of the recipes that come with hfquant."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def is_file(recipe: str | Path) -> bool:
    """Whether this means a file: names never have a slash or one of these endings."""
    return isinstance(recipe, Path) or "/" in recipe or recipe.endswith((".yaml", ".yml", ".json"))


def read_file(path: Path) -> dict[str, Any]:
    """The data of a recipe file; its name defaults to the file's."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe file `{path}` does not exist", "`hfquant recipes` lists the presets") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file `{path}` cannot be read: {error}", "a recipe is a text file in YAML") from None
    data = read_yaml(text, f"recipe file `{path}`")
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"recipe file `{path}` is not a mapping of keys to values",
            "`hfquant recipes gptq-w4g128` prints one",
        )
    return {"name": path.stem, **data}


def expand(name: str) -> dict[str, Any]:
    """The long form of a shorthand.  Raises RecipeError on what it cannot say.

    Bits at a step that cannot round (`lorc-w3g64`, `smoothquant-w8a8`) mean rounding to nearest, unless another step
    rounds; at one that prunes, both in one pass.
    """
    steps: list[dict[str, Any]] = []
    said: dict[str, list[Any]] = {"grids": [], "activations": [], "attention": [], "kv_caches": []}
    for step in read_name(name):
        steps.append({"method": step.method, **_options(step.method, step.what, name)})
        if step.numbers is None:
            continue
        if step.numbers.bits != 16 and "joint" in methods.load(step.method).model_fields:
            steps[-1]["joint"] = True
        _add(said["grids"], step.numbers.grid)
        _add(said["activations"], step.numbers.activations)
        _add(said["attention"], step.numbers.attention_bits)
        _add(said["kv_caches"], step.numbers.kv_cache)
    for what, found in said.items():
        if len(found) > 1:
            raise RecipeError(f"recipe `{name}` has two {what}", "give bits once, e.g. `gptq-w4g128`")
    rounds = [methods.kind(step["method"]) == "quantize" or step.get("joint") for step in steps]
    if said["grids"] and said["grids"][0]["bits"] != 16 and not any(rounds):
        after = [i for i, step in enumerate(steps) if methods.kind(step["method"]) in ("compensate", "distill")]
        steps.insert(min(after, default=len(steps)), {"method": "rtn"})
    if any(rounds) and not said["grids"]:
        raise RecipeError(f"recipe `{name}` does not say how many bits", "give bits once, e.g. `gptq-w4g128`")
    data: dict[str, Any] = {"name": name.lower(), "steps": steps}
    if said["grids"]:
        data["grid"] = said["grids"][0]
    if said["activations"]:
        # 16-bit activations are activations left alone: `w4a16` is how others write `w4`
        data["activations"] = None if said["activations"][0]["bits"] == 16 else said["activations"][0]
    if said["kv_caches"] and said["kv_caches"][0] != {"bits": 16}:
        data["kv_cache"] = said["kv_caches"][0]
    if said["attention"]:
        data["overrides"] = {"@attention": {"bits": said["attention"][0]}}
    return data


def _add(found: list[Any], value: Any) -> None:
    if value is not None and value not in found:
        found.append(value)


def with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """With the keys that a step's method wants where the recipe says nothing."""
    if data.get("budget") is not None:  # the grid of what is not chosen for
        data = {"steps": [{"method": "gptq"}], "grid": {"bits": 4, "group_size": 64}} | data
    defaults: dict[str, Any] = {}
    for step in data["steps"] if isinstance(data.get("steps"), list) else ():
        if isinstance(step, Mapping) and step.get("method") in methods.NAMES:
            defaults |= getattr(methods.load(step["method"]), "defaults", {})
    grid = defaults.pop("grid", None)
    if grid and isinstance(given := data.get("grid"), str | Mapping):
        defaults["grid"] = grid | (read_grid(given) if isinstance(given, str) else dict(given))
        data = {key: value for key, value in data.items() if key != "grid"}
    return data | {key: value for key, value in defaults.items() if key not in data}


def _options(method: str, what: str | None, name: str) -> dict[str, Any]:
    read = getattr(methods.load(method), "shorthand", None)
    if what is None:
        return {}
    if read is None:
        raise RecipeError(
            f"method `{method}` takes nothing between its name and its bits (`{what}` in `{name}`)",
            f"write `{method}-w4g128`",
        )
    try:
        found: dict[str, Any] = read(what)
    except ValueError as error:
        raise RecipeError(f"method `{method}` cannot read `{what}` in `{name}`: {error}") from None
    return found


def change(data: dict[str, Any], text: str, keys: Mapping[str, str]) -> None:
    """Apply one `key=value` to a recipe's data, in place.

    Keys are dotted paths (`grid.bits`, `steps.0.damp`); a step can be named by its method (`gptq.damp`); what
    follows `overrides.` is a glob, dots and all.  `keys` are those a path may begin with, and what they mean:
    a few inner ones need no path (`bits`).
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"cannot read `{text}` as a change to the recipe", "write key=value, e.g. `grid.bits=3`")
    path = keys.get(key, key).split(".")
    read = read_yaml(value, f"the value of `{key}`")
    if path[0] == "overrides" and len(path) > 1:
        # in front: the first pattern that matches decides
        data["overrides"] = {".".join(path[1:]): read} | dict(data.get("overrides") or {})
        return
    steps = [step.get("method") if isinstance(step, dict) else None for step in data.get("steps") or []]
    if path[0] in steps:
        path = ["steps", str(steps.index(path[0])), *path[1:]]
    elif path[0] not in keys:
        options = [
            f"{step}.{name}" for step in steps if step in methods.NAMES for name in methods.load(step).model_fields
        ]
        meant = [option for option in options if option.endswith(f".{key}")]
        message, hint = unknown_key(path[0], dict.fromkeys([*keys, *options]), "the recipe")
        raise RecipeError(message, f"did you mean `{meant[0]}`?" if meant else hint)
    _set(data, path, read, key)


def _set(at: Any, path: list[str], value: Any, key: str) -> None:
    """Put `value` at `path` inside nested dicts and lists, making dicts on the way."""
    for depth, part in enumerate(path):
        where: Any = part
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                there = ".".join(path[: depth + 1])
                raise RecipeError(f"`{key}`: there is no `{there}`", f"there are {len(at)}, counted from 0")
            where = int(part)
        elif not isinstance(at, dict):
            raise RecipeError(f"`{key}`: `{'.'.join(path[:depth])}` is one value", "set it as a whole")
        elif at.get(part) is None and depth < len(path) - 1:
            at[part] = {}
        if depth == len(path) - 1:
            at[where] = value
        else:
            at = at[where]
