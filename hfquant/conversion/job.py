"""What can be seen of a conversion: its state, its steps, what happened, what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["queued", "running", "review", "done", "failed", "cancelled"]
Kind = Literal["state", "step", "plan", "layer", "progress", "log", "publish"]

ACTIVE: tuple[State, ...] = ("queued", "running")
FINAL: tuple[State, ...] = ("done", "failed", "cancelled")
LOCAL_STEPS = (
    "preflight", "resolve", "download", "compress", "evaluate", "gate", "card", "push", "verify", "cleanup",
)  # fmt: skip
REMOTE_STEPS = ("preflight", "resolve", "run", "verify", "cleanup")


class Unwanted(Exception):
    """The job was cancelled, or is another worker's: nothing more is to be done for it here."""


@dataclass(frozen=True)
class Failure:
    """Why a job stopped, in words for its owner.  kind: the error's class, such as `QualityError`; `Bug` for ours."""

    kind: str
    message: str
    hint: str | None = None


@dataclass(frozen=True)
class Step:
    """One step of a job.  seconds: of its last run, None while there was none."""

    name: str
    state: Literal["waiting", "running", "done", "failed", "skipped"]
    seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """Of the compression.  share: 0 to 1 of all weights.  eta: seconds to the end of the job, None while unknown."""

    share: float = 0.0
    layers_done: int = 0
    layers: int = 0
    blocks_done: int = 0
    blocks: int = 0
    eta: float | None = None


@dataclass(frozen=True)
class Pushed:
    """Where the result is.  pull_request: its number, if it is one.  private: None while the Hub was not asked."""

    repo: str
    url: str
    commit: str
    pull_request: int | None = None
    private: bool | None = None


@dataclass(frozen=True)
class Job:
    """A conversion as its owner sees it.

    request: as `Request.model_dump()`, with the recipe in full under `recipe`.  key: equal for equal requests.
    revision: the original's commit.  attempt: from 1; `resume` and `retry` begin another.  place: in the queue, from 1.
    created, started, finished: seconds since 1970.  has_report: whether `Service.report` has something to give.
    """

    id: str
    user: str
    state: State
    request: Mapping[str, Any]
    key: str
    revision: str | None
    attempt: int
    created: float
    started: float | None
    finished: float | None
    steps: tuple[Step, ...]
    progress: Progress
    place: int | None = None
    failure: Failure | None = None
    pushed: Pushed | None = None
    has_report: bool = False

    @property
    def step(self) -> str | None:
        """The step that is running."""
        return next((step.name for step in self.steps if step.state == "running"), None)

    @property
    def is_final(self) -> bool:
        """Whether nothing will happen any more unless somebody asks for it."""
        return self.state in (*FINAL, "review")


@dataclass(frozen=True)
class Event:
    """Something that happened.  number grows within a job; time: seconds since 1970.

    data, by kind: `state` {state}; `step` {name, state, seconds}; `plan` {layers, blocks, bytes_after, peak_memory,
    disk, seconds}; `layer` {name, block, blocks, error, bytes_before, bytes_after, share, eta, grid}; `progress`
    {text} of other steps; `log` {text}; `publish` {repo, user, text}.
    """

    number: int
    time: float
    kind: Kind
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Submitted:
    """created: False if an equal request was there already, whose job this is."""

    id: str
    created: bool
