"""The file that says what a publisher wants converted.  Strict: a key that means nothing is an error."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ...errors import FleetError, RecipeError
from ...recipe import Recipe
from ...recipe_errors import validate
from ...recipe_parts import Gate, Strict
from ...recipe_source import is_file, read_yaml
from ..request import repository

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)?")
SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
PLACES = ("namespace", "owner", "name", "recipe")


def _duration(value: Any) -> Any:
    """`2h`, `30min`, or seconds."""
    found = DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return int(float(found[1]) * SECONDS[found[2]]) if found else value


class Terms(Strict):
    """How conversions are made and where they go; what an entry leaves out, `defaults` says."""

    namespace: str | None = Field(default=None, description="user or organization that results are pushed to")
    private: bool | None = Field(default=None, description="of new repositories; null: as the original")
    push: Literal["commit", "pr"] | None = Field(default=None, description="`commit`, or `pr`: as a pull request")
    executor: Literal["local", "hf-jobs", "ray"] | None = Field(default=None, description="`local`, `hf-jobs`, `ray`")
    flavor: str | None = Field(default=None, description="the hardware: of `hf-jobs`, `a10g-small`; of `ray`, `cpu-4`")
    timeout: Annotated[int | None, BeforeValidator(_duration)] = Field(
        default=None, ge=60, description="what one conversion may take: `2h`, `30min` or seconds"
    )
    max_usd: float | None = Field(default=None, gt=0, description="of `hf-jobs`: what one conversion may cost")
    accept_terms: bool | None = Field(default=None, description="restrictive licences were read and are kept")
    gates: Gate | None = Field(default=None, description="limits of quality, in place of the recipe's own")

    def over(self, others: "Terms") -> "Terms":
        """These, and the others' where these say nothing."""
        said = {name: value for name in Terms.model_fields if (value := getattr(self, name)) is not None}
        return Terms(**({name: getattr(others, name) for name in Terms.model_fields} | said))


class Search(Strict):
    """Models by what the Hub knows of them."""

    author: str | None = Field(default=None, description="user or organization")
    text: str | None = Field(default=None, description="words in the id")
    pipeline: str | None = Field(default=None, description="task, such as `text-generation`")
    tags: tuple[str, ...] = Field(default=(), description="all of which a model must have")
    max_params: float | None = Field(default=None, gt=0, description="of parameters")

    @model_validator(mode="after")
    def _is_narrow(self) -> Self:
        if not (self.author or self.text or self.tags):
            raise ValueError("name an `author`, some `text` or `tags`: everything on the Hub is too much")
        return self


class Entry(Terms):
    """Some models and the recipes for each of them."""

    id: str | None = Field(default=None, description="one model, `namespace/name`")
    search: Search | None = Field(default=None, description="or all that a search finds")
    limit: int = Field(default=100, ge=1, le=10_000, description="of what a search finds, most downloaded first")
    revision: str = Field(default="main", description="branch or tag that is followed")
    recipes: tuple[str, ...] = Field(min_length=1, description="names out of `recipes`, or presets")

    @field_validator("id")
    @classmethod
    def _is_repository(cls, value: str | None) -> str | None:
        return None if value is None else repository(value)

    @model_validator(mode="after")
    def _names_models(self) -> Self:
        if (self.id is None) == (self.search is None):
            raise ValueError("give either `id` or `search`")
        return self


class Manifest(Strict):
    """A fleet: which models, which recipes, where the results go."""

    version: Literal[1] = Field(description="of this format: 1")
    defaults: Terms = Field(default=Terms(), description="what holds for every entry that says nothing else")
    recipes: dict[str, str | dict[str, Any]] = Field(
        default_factory=dict, description="name -> a recipe: its file, its shorthand, or the whole of it"
    )
    models: tuple[Entry, ...] = Field(min_length=1, description="what is wanted")
    output: str = Field(
        default="{namespace}/{name}-{recipe}", description="names of results, from namespace, owner, name and recipe"
    )

    @field_validator("output")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        named = re.findall(r"\{(.*?)\}", value)
        if unknown := [name for name in named if name not in PLACES]:
            raise ValueError(f"knows no `{{{unknown[0]}}}`; it may have {', '.join(f'{{{name}}}' for name in PLACES)}")
        if "name" not in named or "recipe" not in named:
            raise ValueError("needs {name} and {recipe}: otherwise two results have one place")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        for entry in self.models:
            terms = entry.over(self.defaults)
            if terms.namespace is None and "{namespace}" in self.output:
                raise ValueError(f"no `namespace` for {entry.id or 'a search'}: results need somewhere to go")
            if terms.executor != "hf-jobs" and terms.max_usd:
                raise ValueError("`max_usd` is for `executor: hf-jobs`")
            if terms.executor not in ("hf-jobs", "ray") and terms.flavor:
                raise ValueError("`flavor` is for `executor: hf-jobs` and `executor: ray`")
        return self

    def recipe(self, name: str) -> Recipe:
        """The recipe of that name in this fleet."""
        return Recipe.parse(self.recipes.get(name, name))

    def target(self, namespace: str | None, model: str, recipe: str) -> str:
        """Where the result of a model and a recipe goes."""
        owner, _, name = model.rpartition("/")
        place = self.output.format(namespace=namespace, owner=owner, name=name, recipe=recipe.replace("+", "-"))
        return repository(place)


def read_manifest(path: Path) -> Manifest:
    """A manifest with its recipes in full; recipe files are looked for beside it.

    Raises FleetError that names the key and where it stood, RecipeError for a recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(f"the fleet `{path}` cannot be read: {error}", "docs/fleet.md shows one") from None
    where = f"fleet `{path.name}`"
    try:
        data = read_yaml(text, where)
        if not isinstance(data, Mapping):
            raise RecipeError(f"{where} is not a mapping of keys to values")
        manifest = validate(Manifest, _in_full(dict(data), path.parent), where)
    except RecipeError as error:
        raise FleetError(error.message, error.hint) from None
    for name in {name for entry in manifest.models for name in entry.recipes}:
        manifest.recipe(name)
    for target in _targets(manifest):
        manifest.target(*target)
    return manifest


def _in_full(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With recipe files read."""
    recipes = data.get("recipes")
    if isinstance(recipes, Mapping):
        read = {
            name: Recipe.parse(folder / given).model_dump(mode="json")
            if isinstance(given, str) and is_file(given)
            else given
            for name, given in recipes.items()
        }
        data["recipes"] = read
    return data


def _targets(manifest: Manifest) -> Iterator[tuple[str | None, str, str]]:
    for entry in manifest.models:
        namespace = entry.over(manifest.defaults).namespace
        yield from ((namespace, entry.id or "owner/model", recipe) for recipe in entry.recipes)
