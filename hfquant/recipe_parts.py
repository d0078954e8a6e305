"""What a recipe is made of: steps, grids, activations, calibration, gate."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from . import methods
from .errors import RecipeError
from .recipe_errors import validate
from .recipe_names import read_activations, read_cache, read_grid

if TYPE_CHECKING:
    from .tensors.encoding import Activations, KVCache
    from .tensors.grid import Grid


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GridSpec(Strict):
    """The integer grid of a weight.  May be written as text: `w4g64`, `w8`, `w3g128sym`.

    16 bits are no grid: weights that are pruned, say, but not rounded.
    """

    bits: int = Field(ge=2, le=16, description="2 to 8, or 16: not rounded")
    group_size: int = Field(
        default=128,
        ge=-1,
        description="columns that share a scale; -1 means the whole row (per output channel)",
    )
    symmetric: bool = Field(
        default=True,
        description="zero in the middle, no zero points stored; where not given: true for 4 and 8 bit only",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = read_grid(data)
        if isinstance(data, Mapping) and data.get("bits") == 16:
            data = {**data, "group_size": -1, "symmetric": True}  # there are no scales to share, no zero points
        if isinstance(data, Mapping) and data.get("symmetric") is None:
            # what the widely readable formats can store: symmetric 4 and 8 bit
            data = {**data, "symmetric": data.get("bits") in (4, 8)}
        return data

    @field_validator("bits")
    @classmethod
    def _exists(cls, value: int) -> int:
        if 8 < value < 16:
            raise ValueError("should be 2 to 8, or 16: not rounded")
        return value

    @field_validator("group_size")
    @classmethod
    def _has_columns(cls, value: int) -> int:
        if value == 0:
            raise ValueError("a group of 0 has no columns")
        return value

    def grid(self) -> "Grid":
        from .tensors.grid import Grid

        return Grid(self.bits, self.group_size, self.symmetric)


class ActivationSpec(Strict):
    """How the inputs of linear layers are rounded when they run.  May be written as text: `a8`, `a8g64`, `a8static`."""

    bits: int = Field(default=8, ge=4, le=8, description="4 to 8")
    per: Literal["token", "group", "tensor", "static"] = Field(
        default="token",
        description="one scale for each `token`, for each `group` of a token's columns, for the whole `tensor` at"
        " hand, or one that is measured in calibration and stored: `static`",
    )
    group_size: int = Field(default=-1, ge=-1, description="columns that share a scale, with `per: group`")
    symmetric: bool | None = Field(
        default=None, description="no zero points; null: asymmetric where the inputs have one sign, as behind a ReLU"
    )
    clip: float = Field(
        default=100.0,
        gt=50,
        le=100,
        description="of `static`: the percentile of the calibration tokens' ranges that is covered; 100 covers all",
    )
    keep: tuple[str, ...] = Field(default=(), description="globs of modules whose inputs are not rounded")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = read_activations(data)
        if isinstance(data, Mapping) and "group_size" in data and "per" not in data:
            data = {**data, "per": "token" if data["group_size"] == -1 else "group"}
        if isinstance(data, Mapping) and isinstance(data.get("keep"), list):
            data = {**data, "keep": tuple(data["keep"])}  # what a validator returns is JSON no more
        return data

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.per == "group") != (self.group_size > 0):
            raise ValueError("`per: group` and a `group_size` go together, e.g. `a8g64`")
        if self.clip != 100 and self.per != "static":
            raise ValueError("`clip` is for `per: static`: the other ranges follow each input")
        return self

    def build(self, one_sided: bool = False) -> "Activations":
        """What a layer does at run time.  one_sided: whether its inputs have one sign only, for `symmetric: null`."""
        from .tensors.encoding import Activations

        symmetric = not one_sided if self.symmetric is None else self.symmetric
        return Activations(self.bits, self.per, self.group_size, symmetric)


class CacheSpec(Strict):
    """How keys and values are kept while text is generated.  May be written as text: `kv8`, `kv4`, `kv2`, `kv8q8`."""

    bits: Literal[2, 4, 8] = Field(default=8, description="8, 4 or 2")
    window: int = Field(default=64, ge=0, description="how many of the newest tokens stay as they are, at least")
    group_size: int = Field(
        default=64, ge=1, description="tokens that share a scale in a channel of keys; channels, in a token's values"
    )
    queries: Literal[8] | None = Field(
        default=None,
        description="8: a new token's queries are rounded too, and compared as integers; null: as they are",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        return read_cache(data) if isinstance(data, str) else data

    def build(self) -> "KVCache":
        from .tensors.encoding import KVCache

        return KVCache(self.bits, self.window, self.group_size, self.queries)


class Step(Strict):
    """One method and its options, written flat: `{method: gptq, act_order: false}`.

    `options` always holds every option of the method, defaults included: a report that shows it is complete.  `only`:
    globs or roles of the layers that it is for, where it is not for all.
    """

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    only: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        method = data.get("method")
        options = {key: value for key, value in data.items() if key not in ("method", "only")}
        if not isinstance(method, str):
            raise RecipeError(f"a step lacks `method`: {dict(data)}", "write `- method: gptq`, then its options")
        chosen = validate(methods.load(method), options, f"step `{method}`")
        return {"method": method, "options": chosen.model_dump(mode="json"), "only": _globs(data.get("only"), method)}

    @model_serializer
    def _dump(self) -> dict[str, Any]:
        return {"method": self.method, **self.options} | ({"only": list(self.only)} if self.only else {})

    def build(self) -> methods.Method:
        """The method with these options, ready to be called on layers."""
        built: methods.Method = methods.load(self.method).model_validate(self.options)
        return built


def _globs(said: Any, method: str) -> tuple[str, ...]:
    """Raises RecipeError for an `only` that names nothing."""
    if said is None:
        return ()
    if not isinstance(said, list | tuple) or not said or not all(isinstance(glob, str) for glob in said):
        raise RecipeError(f"`only` of step `{method}` is not a list of names", "write `only: ['*.down_proj']`")
    return tuple(said)


class Calibration(Strict):
    """The text that shows the layers typical inputs; used only by methods that look at them."""

    source: str = Field(
        default="default",
        description="`default`, `self` (the model's own text), `random` (tokens), a text file or a Hub dataset",
    )
    samples: int = Field(default=64, ge=1, description="how many sequences")
    seq_len: int = Field(default=512, ge=8, description="tokens per sequence")
    seed: int = Field(default=0, ge=0, description="chooses the sequences")

    @field_validator("source")
    @classmethod
    def _is_named(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("names no text; `default` is the one that comes with hfquant")
        return value


class Gate(Strict):
    """What the result must reach; null switches a limit off.  NaN never passes."""

    max_ppl_ratio: float | None = Field(default=3.0, gt=1, description="perplexity, as a multiple of the original's")
    max_kl: float | None = Field(default=None, gt=0, description="mean KL divergence from the original, nats per token")
    min_top1_agreement: float | None = Field(
        default=None, ge=0, le=1, description="share of tokens ranked first by both"
    )
