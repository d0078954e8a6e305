"""What is to be done about one pair of a model and a recipe, and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ... import __version__
from .. import licences
from ..job import ACTIVE, Job
from ..settings import Limits
from .sight import Result
from .wanted import Wanted

Kind = Literal["up to date", "missing", "stale", "running", "failed", "blocked", "foreign"]
DUE: tuple[Kind, ...] = ("missing", "stale")
FIRST_PAUSE, LONGEST_PAUSE = 600.0, 86_400.0  # seconds after a failure; doubled with each one
FINAL_FAILURES = ("QualityError", "RecipeError", "RequestError", "FormatError")  # the same again ends the same


@dataclass(frozen=True, slots=True)
class Verdict:
    """kind, and the reasons in words.  due: whether it is to be done now.  usd: at most, of what is to be done.

    lost: the job that made it is done, so that it has to begin anew.
    """

    wanted: Wanted
    kind: Kind
    reasons: tuple[str, ...] = ()
    due: bool = False
    usd: float = 0.0
    job: str | None = None
    result: Result | None = None
    lost: bool = False

    @property
    def settled(self) -> bool:
        """Whether nothing differs from what is wanted."""
        return self.kind == "up to date"


def judge(wanted: Wanted, result: Result, job: Job | None, limits: Limits, now: float) -> Verdict:
    """The verdict on one pair.  job: the latest for the same original, recipe and target, if there is one."""
    reasons = differences(wanted, result)
    if job is not None and job.state in (*ACTIVE, "review"):
        return Verdict(wanted, "running", (_stage(job),), job=job.id, result=result)
    if result.exists and result.made is None and not result.empty:
        return Verdict(wanted, "foreign", (result.broken or "it was not made by hfquant",), result=result)
    if result.made is not None and _base(result.made) not in (wanted.model, None):
        return Verdict(wanted, "foreign", (f"it was made from {_base(result.made)}",), result=result)
    if wanted.original is None:
        return Verdict(wanted, "blocked", (wanted.trouble or "the original cannot be read",), result=result)
    if not reasons:
        return Verdict(wanted, "up to date", result=result)
    if blocked := hindrances(wanted, limits):
        return Verdict(wanted, "blocked", blocked, result=result)
    if job is not None and job.state == "done" and wanted.terms.push == "pr" and job.pushed is not None:
        return Verdict(wanted, "running", (f"pull request {job.pushed.pull_request} waits",), job=job.id, result=result)
    usd = wanted.terms.max_usd or limits.usd if wanted.terms.executor == "hf-jobs" else 0.0
    if job is not None and job.state == "failed" and job.failure is not None:
        return _failed(wanted, result, job, now, usd)
    kind: Kind = "missing" if not result.exists or result.empty else "stale"
    lost = job is not None and job.state == "done"
    return Verdict(wanted, kind, reasons, due=True, usd=usd, job=job.id if job else None, result=result, lost=lost)


def differences(wanted: Wanted, result: Result) -> tuple[str, ...]:
    """Why what is there is not what is wanted; empty if it is."""
    if not result.exists or result.empty:
        return ("there is nothing yet",)
    if result.made is None or wanted.original is None:
        return ()
    made, reasons = result.made, []
    revision = (made.get("base") or {}).get("revision")
    if revision != wanted.original.commit:
        reasons.append(f"the original moved from {_short(revision)} to {_short(wanted.original.commit)}")
    if (made.get("recipe") or {}).get("hash") != wanted.chosen.hash:
        reasons.append("the recipe changed")
    version = str((made.get("versions") or {}).get("hfquant"))
    if _minor(version) != _minor(__version__):
        reasons.append(f"hfquant changed from {version} to {__version__}")
    if result.broken:
        reasons.append(result.broken)
    return tuple(reasons)


def hindrances(wanted: Wanted, limits: Limits) -> tuple[str, ...]:
    """What would have the service refuse it, as far as the original's page tells."""
    original = wanted.original
    assert original is not None
    reasons = []
    problem = licences.problem(original.facts, bool(wanted.terms.accept_terms))
    if problem is not None and problem.blocks:
        reasons.append(problem.message)
    if original.quantized:
        reasons.append("the original is quantized already")
    if original.parameters is not None and original.parameters > limits.parameters:
        reasons.append(f"{original.parameters / 1e9:,.1f} billion parameters are more than may be converted here")
    return tuple(reasons)


def _failed(wanted: Wanted, result: Result, job: Job, now: float, usd: float) -> Verdict:
    """Tried again after a while, longer each time; not at all where it would end the same."""
    assert job.failure is not None
    message = job.failure.message.splitlines()[0]
    if job.failure.kind in FINAL_FAILURES:
        return Verdict(
            wanted, "failed", (message, "not tried again until something changes"), job=job.id, result=result
        )
    pause = min(FIRST_PAUSE * 2 ** (job.attempt - 1), LONGEST_PAUSE)
    left = (job.finished or now) + pause - now
    when = f"attempt {job.attempt} failed" + (
        f", the next in {left / 60:,.0f} min" if left > 0 else ", tried again now"
    )
    return Verdict(wanted, "failed", (message, when), due=left <= 0, usd=usd, job=job.id, result=result)


def _stage(job: Job) -> str:
    return f"waiting, number {job.place}" if job.state == "queued" else job.step or job.state


def _base(made: Mapping[str, Any]) -> str | None:
    return (made.get("base") or {}).get("id")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _short(commit: Any) -> str:
    return str(commit)[:7]
