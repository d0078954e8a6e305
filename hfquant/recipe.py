"""A recipe: what to do to a model, as data.

One frozen object is the YAML file, the command line's options, the dict in a checkpoint's report and the
table on the card.  It is strict at the door (an unknown key is an error, "4" is not 4) and trusted inside.

Importing this module is quick; method classes, which need torch, are imported when a recipe is parsed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from . import methods, recipe_order, recipe_places
from .errors import RecipeError
from .recipe_budget import Budget, check_steps
from .recipe_errors import validate
from .recipe_names import read_grid
from .recipe_parts import ActivationSpec, CacheSpec, Calibration, Gate, GridSpec, Step, Strict
from .recipe_places import Place
from .recipe_source import change, expand, is_file, presets, read_file, with_defaults

__all__ = ["ActivationSpec", "CacheSpec", "Calibration", "Gate", "GridSpec", "Place", "Recipe", "Step"]


class Recipe(Strict):
    """What to do to a model: ordered steps, the grid they end on, and what is exempt.  See `Recipe.parse`."""

    name: str = Field(default="custom", min_length=1, description="how reports and cards call it")
    description: str = Field(default="", description="one sentence for `hfquant recipes`")
    steps: tuple[Step, ...] = Field(min_length=1, description="methods in the order they are applied to a layer")
    grid: GridSpec = Field(
        default=GridSpec(bits=16),
        description="the number format of the linear layers, e.g. `w4g128`; needed if any step rounds",
    )
    activations: ActivationSpec | None = Field(
        default=None, description="how the inputs of the linear layers are rounded, e.g. `a8`; null: not at all"
    )
    kv_cache: CacheSpec | None = Field(
        default=None, description="how keys and values are kept while text is generated, e.g. `kv8`; null: as they are"
    )
    overrides: dict[str, GridSpec | None] = Field(
        default_factory=dict,
        description="glob of module names, or a role such as `@attention` -> grid, or null to keep; the first that"
        " matches decides; what a grid leaves out is taken from `grid`",
    )
    keep: tuple[str, ...] = Field(
        default=(),
        description="globs or roles of modules left as they are, before any override, e.g. `['@blocks:0']`",
    )
    embeddings: GridSpec | None = Field(
        default=None, description="the grid of token embeddings and output head, e.g. `w8`; null keeps both"
    )
    format: Literal["auto", "native", "compressed_tensors", "gptq"] = Field(
        default="auto",
        description="`auto` (the most widely loadable that fits), `native`, `compressed_tensors` or `gptq`",
    )
    dtype: Literal["auto", "keep", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="of what is not quantized: `auto`, `keep`, `bfloat16`, `float16` or `float32`",
    )
    budget: Budget | None = Field(
        default=None, description="what the result may weigh or lose, e.g. `{fit: 2.5GB}`: the grids are then chosen"
    )
    calibration: Calibration = Field(default=Calibration(), description="source, samples, seq_len and seed")
    gate: Gate = Field(default=Gate(), description="limits that fail the command when quality collapsed")

    @classmethod
    def parse(cls, recipe: "str | Path | Mapping[str, Any] | Recipe", overrides: Sequence[str] = ()) -> Self:
        """A recipe from a preset's name, a shorthand (`gptq-w3g64`), a YAML file, a dict, or another recipe.

        `overrides` are `key=value` texts, applied in order: `grid.bits=3` or `bits=3`, `steps.0.damp=0.05` or
        `gptq.damp=0.05`, `overrides.*.down_proj=w8g64`, `keep=['*.0.*']`.

        Raises RecipeError, which names the key, where it stood, and the nearest one that exists.
        """
        data, where = _source(recipe)
        data = with_defaults(data)
        for text in overrides:
            change(data, text, _keys())
        if overrides and not any(text.partition("=")[0].strip() == "name" for text in overrides):
            data["name"] = f"{data.get('name', 'custom')} with {', '.join(overrides)}"
        try:
            return validate(cls, _inherit(data), where)
        except RecipeError as error:
            if where in error.message or not where.startswith("recipe file"):
                raise
            raise RecipeError(f"{error.message} (in {where})", error.hint) from None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        recipe_places.check(self.patterns)
        recipe_order.check(self.steps, self.grid, self.overrides)
        if self.budget is not None:
            check_steps({step.method: methods.kind(step.method) for step in self.steps}, self.format)
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        """All globs and roles that it mentions."""
        only = (glob for step in self.steps for glob in step.only)
        by_layer = (
            pattern
            for step in self.steps
            for option in getattr(methods.load(step.method), "by_layer", ())
            for pattern in step.options[option]
        )
        own = (*(self.activations.keep if self.activations else ()), *only, *by_layer)
        return (*self.keep, *self.overrides, *own)

    def steps_of(self, module: str, place: Place | None = None) -> tuple[Step, ...]:
        """The steps that are for a module: of several that do the same, the first."""
        found: list[Step] = []
        taken: set[str] = set()
        for step in self.steps:
            if step.only:
                kind = methods.kind(step.method)
                if kind in taken or not any(recipe_places.matches(glob, module, place) for glob in step.only):
                    continue
                taken.add(kind)
            found.append(step)
        return tuple(found)

    def grid_for(self, module: str, kind: str = "linear", place: Place | None = None) -> GridSpec | None:
        """The grid of a module, None if it stays as it is.

        `kind` is "linear", "conv1d", "experts", or, for the two ends of the model, "embedding" and "head":
        those follow `embeddings` unless a glob names them.  place: where in its stack a module inside it stands.
        """
        if any(recipe_places.matches(glob, module, place) for glob in self.keep):
            return None
        for glob, grid in self.overrides.items():
            if recipe_places.matches(glob, module, place):
                return grid
        return self.embeddings if kind in ("embedding", "head") else self.grid

    def activations_for(self, module: str, kind: str = "linear", place: Place | None = None) -> ActivationSpec | None:
        """How the inputs of a module are rounded, None if they are not.

        Token ids are not rounded, the head's inputs neither: it is the layer that errors hurt most.
        """
        spec = self.activations
        if spec is None or kind in ("embedding", "head"):
            return None
        return None if any(recipe_places.matches(glob, module, place) for glob in spec.keep) else spec

    @property
    def needs_calibration(self) -> bool:
        """Whether any step looks at the inputs of the layers, or a scale of theirs is measured."""
        static = self.activations is not None and self.activations.per == "static"
        return self.budget is not None or static or any(step.build().needs_hessian for step in self.steps)

    @property
    def generates(self) -> bool:
        """Whether the model writes its calibration text itself."""
        return self.needs_calibration and self.calibration.source == "self"

    @property
    def rewrites(self) -> bool:
        """Whether a step gives the whole model other weights before its blocks are compressed."""
        return any(getattr(step.build(), "rewrites", False) for step in self.steps)

    @property
    def trains(self) -> bool:
        """Whether the whole model is trained: `hfquant train`, not `hfquant compress`."""
        return any(methods.scope(step.method) == "model" for step in self.steps)

    @property
    def distills(self) -> bool:
        """Whether finished blocks are trained."""
        return any(methods.kind(step.method) == "distill" for step in self.steps)

    @property
    def hash(self) -> str:
        """16 hex digits of all that decides the compressed bytes: equal for equal work, whatever its name."""
        data = self.model_dump(mode="json", exclude={"name", "description", "gate"})
        data["overrides"] = list(data["overrides"].items())  # their order decides
        for later in ("activations", "kv_cache", "budget"):
            if data[later] is None:
                del data[later]  # runs begun before there was such a key go on
        if (cache := data.get("kv_cache")) and cache["queries"] is None:
            del cache["queries"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The recipe in full, every default written out.  `Recipe.parse` of it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _source(recipe: str | Path | Mapping[str, Any] | Recipe) -> tuple[dict[str, Any], str]:
    """Plain data of our own to change, and what to call it in errors."""
    if isinstance(recipe, Recipe):
        return recipe.model_dump(mode="json"), f"recipe `{recipe.name}`"
    if isinstance(recipe, Mapping):
        return json.loads(json.dumps(dict(recipe), default=str)), "the recipe"
    if is_file(recipe):
        return read_file(Path(recipe)), f"recipe file `{recipe}`"
    name = str(recipe)
    return read_file(presets()[name]) if name in presets() else expand(name), f"recipe `{name}`"


def _keys() -> dict[str, str]:
    """The keys that a change may begin with, and the paths of those inner ones that need none."""
    grid = {key: f"grid.{key}" for key in GridSpec.model_fields}
    return (
        {key: key for key in Recipe.model_fields}
        | grid
        | {key: f"calibration.{key}" for key in ("samples", "seq_len", "seed")}
    )


def _inherit(data: dict[str, Any]) -> dict[str, Any]:
    """Complete the exceptional grids from the general one."""
    grid = data.get("grid")
    base = read_grid(grid) if isinstance(grid, str) else grid
    if not isinstance(base, Mapping):
        return data

    def complete(special: Any) -> Any:
        return {**base, **special} if isinstance(special, Mapping) else special

    if "embeddings" in data:
        data = data | {"embeddings": complete(data["embeddings"])}
    if isinstance(data.get("overrides"), Mapping):
        data = data | {"overrides": {glob: complete(special) for glob, special in data["overrides"].items()}}
    return data
