"""What somebody asks for: one model, one recipe, one place for the result.  Strict at the door, trusted inside."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .. import __version__
from ..errors import RecipeError, RequestError
from ..recipe import Recipe
from ..recipe_errors import validate
from ..recipe_parts import Strict

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
SOURCES = ("default", "self", "random")
MAX_TEXT = 1_000_000  # characters of calibration text
MAX_REMOTE_TEXT = 50_000  # of those, where they travel in a Job's environment
MAX_RECIPE = 100_000  # characters of its JSON


def repository(value: str) -> str:
    """`namespace/name`, both as the Hub allows them.  Raises ValueError for anything else."""
    parts = value.split("/")
    if len(parts) != 2 or not all(NAME.fullmatch(part) for part in parts) or ".." in value or "--" in value:
        raise ValueError("should be `namespace/name` on the Hub")
    if any(part.endswith((".git", ".", "-")) for part in parts):
        raise ValueError("should be `namespace/name` on the Hub, neither ending in `.git`, a dot or a dash")
    return value


class Request(Strict):
    """One conversion.  `Request.parse` reads it from a dict, and says what is wrong with it in words."""

    model: str = Field(description="the original, `namespace/name` on the Hub")
    revision: str = Field(default="main", description="branch, tag or commit of the original")
    recipe: str | dict[str, Any] = Field(description="a recipe's name such as `gptq-w4g64`, or a whole recipe")
    changes: tuple[str, ...] = Field(default=(), max_length=100, description="changes to the recipe: `bits=3`")
    calibration_text: str | None = Field(
        default=None, max_length=MAX_TEXT, description="calibrate with this text instead of the recipe's source"
    )
    target: str | None = Field(
        default=None, description="`namespace/name` that the result is pushed to; null: it is kept for download"
    )
    private: bool | None = Field(
        default=None, description="who sees a new repository; null: private if the original is private or gated"
    )
    pull_request: bool = Field(default=False, description="offer the result as a pull request")
    review: bool = Field(default=False, description="stop before the push until somebody releases the job")
    accept_terms: bool = Field(default=False, description="the original's restrictive licence was read and is kept")
    executor: Literal["local", "hf-jobs", "ray"] = Field(default="local", description="where the work is done")
    hardware: str | None = Field(
        default=None, max_length=40, description="of `hf-jobs`: the flavour, `a10g-small`; of `ray`: `cpu-4`, `gpu-1`"
    )
    max_usd: float | None = Field(default=None, gt=0, description="of `hf-jobs`: what it may cost at most")
    timeout: int | None = Field(default=None, ge=60, description="seconds that the work may take at most")
    priority: int = Field(default=50, ge=1, le=100, description="smaller goes first, among all users' jobs")

    @classmethod
    def parse(cls, request: "Mapping[str, Any] | Request") -> Self:
        """Raises RequestError for what is not a request, RecipeError for its recipe."""
        if isinstance(request, cls):
            return request
        try:
            return validate(cls, dict(request), "the request")
        except RecipeError as error:
            raise RequestError(error.message, error.hint or "leave one of them out") from None

    @field_validator("model", "target")
    @classmethod
    def _is_repository(cls, value: str | None) -> str | None:
        return None if value is None else repository(value)

    @field_validator("revision")
    @classmethod
    def _is_revision(cls, value: str) -> str:
        if not REVISION.fullmatch(value) or ".." in value:
            raise ValueError("should be a branch, a tag or a commit")
        return value

    @field_validator("changes")
    @classmethod
    def _is_short(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(len(change) > 500 for change in value):
            raise ValueError("a change should be `key=value`, at most 500 characters")
        return value

    @field_validator("calibration_text")
    @classmethod
    def _says_something(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty: give some text, or leave it out for that of the recipe")
        return value

    @field_validator("recipe")
    @classmethod
    def _is_small(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        if len(json.dumps(value)) > MAX_RECIPE:
            raise ValueError(f"should be shorter than {MAX_RECIPE:,} characters")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.pull_request and self.target is None:
            raise ValueError("`pull_request` needs a `target`")
        if self.executor == "local" and self.hardware:
            raise ValueError("`hardware` and `max_usd` are for `executor: hf-jobs`")
        if self.executor != "hf-jobs" and self.max_usd:
            raise ValueError("`hardware` and `max_usd` are for `executor: hf-jobs`")
        if self.executor == "hf-jobs" and len(self.calibration_text or "") > MAX_REMOTE_TEXT:
            raise ValueError(f"`executor: hf-jobs` takes at most {MAX_REMOTE_TEXT:,} characters of calibration text")
        if self.executor != "local" and self.review:
            raise ValueError(f"`executor: {self.executor}` pushes by itself: make the target private, not a review")
        if self.executor != "local" and self.target is None:
            raise ValueError(f"`executor: {self.executor}` needs a `target`: nothing is kept where the work is done")
        return self

    def chosen(self) -> Recipe:
        """The recipe, complete.  Raises RecipeError, also for one that would read files of this machine."""
        if isinstance(self.recipe, str) and not re.fullmatch(r"[\w.+-]{1,200}", self.recipe, re.ASCII):
            raise RecipeError(f"`{self.recipe[:80]}` is not a recipe's name", "`hfquant recipes` lists some")
        if isinstance(self.recipe, str) and self.recipe.endswith((".yaml", ".yml", ".json")):
            raise RecipeError("a recipe's file cannot be read from here", "give its content")
        recipe = Recipe.parse(self.recipe, self.changes)
        source = recipe.calibration.source
        if self.calibration_text is None and source not in SOURCES:
            raise RecipeError(
                f"calibration from `{source[:80]}` is not possible here", "give the text itself, or leave it out"
            )
        return recipe


def key(wish: Request, revision: str) -> str:
    """64 hex digits, equal for equal requests: same original, recipe, calibration, version of hfquant, and target."""
    recipe = wish.chosen()
    parts = {
        "base": [wish.model, revision],
        "recipe": [recipe.hash, recipe.gate.model_dump(mode="json")],
        "text": None if wish.calibration_text is None else hashlib.sha256(wish.calibration_text.encode()).hexdigest(),
        "hfquant": ".".join(__version__.split(".")[:2]),
        "target": [wish.target, wish.pull_request],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
