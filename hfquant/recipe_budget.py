"""What a result may weigh or lose, where the user names that instead of bits: `budget:` of a recipe."""

import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import RecipeError
from .sizes import read_size

Share = float | str  # of weights that are pruned: a share, or a pattern
FASTEST_LOSS = 0.05  # of `fastest`, where no other is allowed
GOALS = ("fit", "average_bits", "max_loss", "fastest")


class Budget(BaseModel):
    """One goal, and what may be chosen from on the way to it.  See `docs/budget.md`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fit: int | None = Field(default=None, gt=0, description="bytes of all weight files, e.g. `2.5GB`")
    average_bits: float | None = Field(
        default=None, gt=0, le=32, description="stored bits per weight of the layers inside the blocks, scales included"
    )
    max_loss: float | None = Field(
        default=None, gt=0, lt=1, description="how much the perplexity may grow, e.g. `1%`: the smallest that keeps it"
    )
    fastest: bool = Field(default=False, description="the least time to generate a token on this machine")
    within: int | None = Field(default=None, gt=0, description="of `fastest`: bytes of all weight files, e.g. `4GB`")
    bits: tuple[int, ...] = Field(default=(2, 3, 4, 5, 6, 7, 8), min_length=1, description="the widths to choose from")
    groups: tuple[int, ...] = Field(
        default=(32, 64, 128), min_length=1, description="the group sizes to choose from; -1: the whole row"
    )
    sparsity: tuple[Share, ...] = Field(
        default=(),
        description="what may be pruned, the rest rounded: a pattern such as `2of4`, or a share such as 0.5",
    )
    ranks: tuple[int, ...] = Field(
        default=(), description="of low-rank corrections beside coarse grids, e.g. `[4, 16]`"
    )
    ends: bool | None = Field(
        default=None,
        description="whether embeddings and output head are chosen for too; null: yes, but not for `average_bits`",
    )
    together: bool = Field(
        default=False, description="layers that read the same input (q, k and v; gate and up) get the same grid"
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for key in ("fit", "within"):
            if isinstance(data.get(key), str):
                data[key] = read_size(data[key])
        if isinstance(data.get("max_loss"), str):
            data["max_loss"] = read_share(data["max_loss"])
        for key in ("bits", "groups", "sparsity", "ranks"):
            if isinstance(data.get(key), list):
                data[key] = tuple(data[key])
        return data

    @field_validator("bits")
    @classmethod
    def _widths(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 2 <= bits <= 8 for bits in value):
            raise ValueError("widths are 2 to 8 bit; that a layer is kept as it is can be chosen anyway")
        return tuple(sorted(set(value)))

    @field_validator("groups")
    @classmethod
    def _columns(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(group < 1 and group != -1 for group in value):
            raise ValueError("a group has at least one column; -1 means the whole row")
        return tuple(sorted(set(value)))

    @field_validator("sparsity")
    @classmethod
    def _shares(cls, value: tuple[Share, ...]) -> tuple[Share, ...]:
        from .methods._mask import read_pattern

        found: list[Share] = []
        for share in value:
            if isinstance(share, str):
                share = "{}of{}".format(*read_pattern(share))
            elif not 0 < share < 1:
                raise ValueError(f"a share that is pruned lies between 0 and 1, not {share:g}")
            found.append(share)
        return tuple(dict.fromkeys(found))

    @field_validator("ranks")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(rank < 1 for rank in value):
            raise ValueError("a rank is at least 1; that there is no correction can be chosen anyway")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        named = [goal for goal in GOALS if getattr(self, goal)]
        if not named:
            raise ValueError("it names no goal: give `fit`, `average_bits`, `max_loss` or `fastest`")
        if len(named) > 1 and set(named) != {"max_loss", "fastest"}:
            raise ValueError(f"`{named[0]}` and `{named[1]}` are two goals; give one of them")
        if self.within is not None and not self.fastest:
            raise ValueError("`within` is for `fastest`; the size alone is `fit`")
        return self

    @property
    def allowed(self) -> float | None:
        """By what share perplexity may grow at most; None where size alone is the goal."""
        return FASTEST_LOSS if self.fastest and self.max_loss is None else self.max_loss

    @property
    def with_ends(self) -> bool:
        """Whether token embeddings and head are chosen for."""
        return self.average_bits is None if self.ends is None else self.ends


def with_goal(recipe: Mapping[str, Any], goal: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data with that goal, or pair of goals, in place of its own; what may be chosen from stays."""
    own = recipe.get("budget") or {}
    choices = {key: value for key, value in own.items() if key not in (*GOALS, "within")}
    return {**recipe, "budget": choices | dict(goal)}


def read_share(text: str) -> float:
    """0.01 for `1%` and for `0.01`.  Raises ValueError on anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    if not found:
        raise ValueError(f"cannot read `{text}` as a share; write 1% or 0.01")
    return float(found[1]) / (100 if found[2] else 1)


def check_steps(methods: Mapping[str, str], form: str) -> None:
    """Raises RecipeError for a recipe whose steps or format leave nothing to choose.  methods: name -> its kind."""
    for name, kind in methods.items():
        if kind not in ("block", "quantize", "distill"):
            raise RecipeError(
                f"a budget chooses what becomes of every layer; step `{name}` says the same for all",
                "leave that step out and list what may be chosen: `budget.sparsity`, `budget.ranks`",
            )
    if form not in ("auto", "native"):
        raise RecipeError(
            f"format `{form}` cannot mix grids in one checkpoint, which is what a budget is spent on",
            "leave `format` out, or use `--set format=native`",
        )
