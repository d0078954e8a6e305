"""The plan for a whole fleet, and doing it: running it twice does nothing twice."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ...errors import HfquantError, LimitError
from ..job import Job
from ..settings import Limits
from .manifest import Manifest
from .sight import Sight
from .verdict import Verdict, judge
from .wanted import Wanted, at_once, wanted

if TYPE_CHECKING:
    from ..service import Service  # which brings the database: a plan needs none


@dataclass(frozen=True)
class Plan:
    """A verdict on every pair, in the manifest's order."""

    verdicts: tuple[Verdict, ...]

    @property
    def due(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.due)

    @property
    def drift(self) -> bool:
        """Whether anything is not as it is wanted."""
        return not all(v.settled for v in self.verdicts)

    @property
    def usd(self) -> float:
        """What doing all of it may cost at most."""
        return sum(v.usd for v in self.due)

    def counts(self) -> dict[str, int]:
        return dict(Counter(v.kind for v in self.verdicts))

    def only(self, patterns: Sequence[str]) -> "Plan":
        """The pairs whose model, recipe, target, or `model recipe` fits one of these globs."""
        kept = [v for v in self.verdicts if not patterns or any(_fits(v.wanted, p) for p in patterns)]
        return Plan(tuple(kept))


@dataclass(frozen=True)
class Asked:
    """What became of a verdict that was due.  error: why the service did not take it."""

    verdict: Verdict
    job: str | None
    created: bool = False
    error: str | None = None


def make_plan(
    manifest: Manifest,
    sight: Sight,
    *,
    jobs: Sequence[Job] = (),
    limits: Limits | None = None,
    models: Sequence[str] | None = None,
    now: float | None = None,
) -> Plan:
    """Compare what is wanted with what is there.

    jobs: known conversions.  models: look at these only.
    """
    pairs = wanted(manifest, sight, models)
    latest = _latest(jobs)
    results = at_once(lambda pair: sight.result(pair.target), pairs)
    at = time.time() if now is None else now
    return Plan(
        tuple(
            judge(pair, result, latest.get(_identity(pair)) if latest else None, limits or Limits(), at)
            for pair, result in zip(pairs, results, strict=True)
        )
    )


def apply(
    plan: Plan, service: "Service", user: str, token: str | None = None, *, most: int | None = None,
    expires: float | None = None,
) -> list[Asked]:  # fmt: skip
    """Ask the service for what is due, at most `most` of it.  Stops where the service's limits are reached."""
    done: list[Asked] = []
    for verdict in plan.due[:most]:
        try:
            found = service.submit(verdict.wanted.request(), user, token, expires=expires)
            if verdict.lost and not found.created:  # what it made is not on the Hub any more, or damaged
                service.retry(found.id, user, token, expires=expires)
        except LimitError as error:
            done.append(Asked(verdict, None, error=error.message))
            break
        except HfquantError as error:
            done.append(Asked(verdict, None, error=error.message))
        else:
            done.append(Asked(verdict, found.id, found.created))
    return done


def _latest(jobs: Sequence[Job]) -> Mapping[Any, Job]:
    """The newest job of every (original, commit, target, recipe)."""
    found: dict[Any, Job] = {}
    for job in sorted(jobs, key=lambda job: job.created):
        recipe = job.request.get("recipe")
        found[job.request.get("model"), job.revision, job.request.get("target"), _dumped(recipe)] = job
    return found


def _identity(pair: Wanted) -> Any:
    commit = pair.original.commit if pair.original else None
    return pair.model, commit, pair.target, _dumped(pair.chosen.model_dump(mode="json"))


def _dumped(recipe: Any) -> str:
    return json.dumps(recipe, sort_keys=True)


def _fits(pair: Wanted, pattern: str) -> bool:
    return any(fnmatchcase(text, pattern) for text in (pair.model, pair.recipe, pair.target, pair.name))
