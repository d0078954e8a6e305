"""What is known of a model and of a request before anything is done."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Problem:
    """Something that stands in the way.  blocks: whether the job would be refused; otherwise it is a warning.

    kind: `missing`, `gated`, `pickle`, `code`, `quantized`, `damaged`, `size`, `architecture`, `license`, `recipe`,
    `tokenizer`, `target`, `token`, `disk`, `memory`, `time`, `money` or `limit`.
    """

    kind: str
    message: str
    hint: str | None = None
    blocks: bool = True


@dataclass(frozen=True)
class ModelFacts:
    """A model on the Hub, from its page and the headers of its files; nothing of it was run.

    bytes: of the weights.  dtypes: parameters by stored type.  gated: False, `auto` or `manual`.
    """

    id: str
    revision: str
    parameters: int
    bytes: int
    files: int
    dtypes: Mapping[str, int]
    model_type: str | None
    architecture: str | None
    license: str | None
    license_link: str | None
    gated: str | bool
    private: bool
    pipeline: str | None
    tags: tuple[str, ...]
    likes: int | None = None
    downloads: int | None = None


@dataclass(frozen=True)
class Runtime:
    """Whether a program will load the result.  note: why not, or what it needs."""

    name: str
    loads: bool
    note: str


@dataclass(frozen=True)
class Hardware:
    """Something that `executor: hf-jobs` can run on.  usd_per_hour: what the Hub takes for it."""

    name: str
    label: str
    usd_per_hour: float
    memory: str
    accelerator: str | None


@dataclass(frozen=True)
class Preview:
    """What a request would cost and give.  bytes and seconds are estimates, None where they cannot be made.

    seconds: of the whole job on this machine, if all goes well and what it will not often exceed; None elsewhere.

    model is None if it cannot be looked at; `problems` says why.  usd: at most; 0 where nothing is billed.
    target: `namespace/name`, None if nothing is pushed.  exists: whether the target is there already.
    private: what a new target would be.  recipe: complete, as `Recipe.model_dump(mode="json")`.
    """

    model: ModelFacts | None
    recipe: Mapping[str, Any] | None
    target: str | None
    exists: bool | None
    private: bool | None
    format: str | None
    bits_per_weight: float | None
    bytes_before: int | None
    bytes_after: int | None
    memory: int | None
    disk: int | None
    seconds: tuple[float, float] | None
    usd: float | None
    runtimes: tuple[Runtime, ...]
    problems: tuple[Problem, ...]

    @property
    def allowed(self) -> bool:
        """Whether `submit` would take it."""
        return not any(problem.blocks for problem in self.problems)

    def with_problems(self, more: Iterable[Problem]) -> "Preview":
        return replace(self, problems=(*self.problems, *more))
