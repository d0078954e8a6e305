"""`hfquant jobs`: conversions that a worker does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RequestError
from . import engine, engine_service
from .arguments import Json, Set
from .output import data, log, print_facts, print_json, print_table
from .push import Private
from .units import duration, size

if TYPE_CHECKING:
    from ..conversion.facts import Preview
    from ..conversion.job import Event, Job
    from ..conversion.service import Service

app = typer.Typer(no_args_is_help=True, help="Conversions from the Hub to the Hub, done by `hfquant worker`.")
Id = Annotated[
    str, typer.Argument(metavar="JOB", help="Its id, the beginning of it, or its target.", show_default=False)
]
User = Annotated[
    str | None,
    typer.Option("--user", envvar="HFQUANT_USER", metavar="NAME", help="Whose jobs.", show_default="you"),
]
SHORT = 10  # characters of an id that are shown in a table


@contextmanager
def _service() -> Iterator["Service"]:
    with engine_service.service() as service:
        yield service


def _found(service: "Service", job: str, user: str) -> str:
    """The id that begins like this, or whose target this is."""
    mine = service.jobs(user, limit=1000) if job else []
    fitting = [found.id for found in mine if found.id.startswith(job) or found.request["target"] == job]
    return fitting[0] if len(fitting) == 1 else job


@app.command()
def submit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id.", show_default=False)],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="NAME|FILE", help="As for `compress`.", show_default=False)
    ],
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="Where the result goes.", show_default="kept here")
    ] = None,
    changes: Set = None,
    revision: Annotated[str, typer.Option(metavar="REV", help="Branch, tag or commit of the original.")] = "main",
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="Calibration text.", show_default="packaged text"
        ),
    ] = None,
    private: Private = None,
    pr: Annotated[bool, typer.Option("--pr", help="Offer the result as a pull request.")] = False,
    review: Annotated[bool, typer.Option("--review", help="Wait for `resume` before the push.")] = False,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="The original's restrictive licence was read, and is kept.")
    ] = False,
    executor: Annotated[
        str, typer.Option(metavar="WHERE", help="`local`, `hf-jobs` (rented at the Hub), or `ray`.")
    ] = "local",
    hardware: Annotated[
        str | None, typer.Option(metavar="NAME", help="What is rented.", show_default="cpu-basic")
    ] = None,
    max_usd: Annotated[
        float | None, typer.Option(min=0.01, metavar="USD", help="What that may cost at most.", show_default=False)
    ] = None,
    priority: Annotated[int, typer.Option(min=1, max=100, metavar="N", help="Smaller goes first.")] = 50,
    preview: Annotated[bool, typer.Option("--preview", help="Tell what it would take and give; do nothing.")] = False,
    user: User = None,
    as_json: Json = False,
) -> None:
    """Ask for a conversion; prints the job's id. The same request again is the same job."""
    chosen = engine.read_recipe(recipe, changes)
    text = None if calibration is None else calibration.read_text("utf-8")
    wish = {
        "model": model, "recipe": chosen.model_dump(mode="json"), "target": push, "revision": revision,
        "calibration_text": text, "private": private, "pull_request": pr, "review": review, "priority": priority,
        "accept_terms": accept_terms, "executor": executor, "hardware": hardware, "max_usd": max_usd,
    }  # fmt: skip
    with _service() as service:
        if preview:
            _tell(service.preview(wish, user=engine_service.user(user), token=engine_service.token()), as_json)
            return
        done = service.submit(wish, engine_service.user(user), engine_service.token())
        if as_json:
            print_json(asdict(done))
        else:
            log().print("queued" if done.created else "this was asked for before")
            print(done.id)


def _tell(found: "Preview", as_json: bool) -> None:
    """Raises RequestError for a request that would be refused."""
    if as_json:
        print_json(asdict(found))
    else:
        print_facts(data(), _preview(found))
        for problem in found.problems:
            log().print(f"{'refused' if problem.blocks else 'note'}: {problem.message}", markup=False)
    if not found.allowed:
        refused = next(problem for problem in found.problems if problem.blocks)
        raise RequestError(refused.message, refused.hint)


def _preview(found: "Preview") -> dict[str, str | None]:
    before, after = found.bytes_before, found.bytes_after
    return {
        "model": f"{found.model.id}, licence {found.model.license or 'unknown'}" if found.model else None,
        "size": f"{size(before)} -> {size(after)} ({after / before:.0%})" if before and after else None,
        "format": found.format,
        "loads in": ", ".join(runtime.name for runtime in found.runtimes if runtime.loads) or None,
        "memory": None if found.memory is None else size(found.memory),
        "disk": None if found.disk is None else size(found.disk),
        "time": None if found.seconds is None else f"about {duration(found.seconds)} on this machine",
        "price": f"at most {found.usd:.2f} USD" if found.usd else None,
    }


@app.command("list")
def list_(user: User = None, as_json: Json = False) -> None:
    """Your jobs, newest first."""
    with _service() as service:
        found = service.jobs(engine_service.user(user))
        if as_json:
            print_json([asdict(job) for job in found])
            return
        rows = [
            (job.id[:SHORT], _state(job), str(job.request["model"]), str(job.request["recipe"]["name"]), _target(job))
            for job in found
        ]
        print_table(["job", "state", "model", "recipe", "target"], rows)


def _state(job: "Job") -> str:
    if job.state == "queued":
        return f"queued ({job.place})"
    if job.state == "running":
        share = f" {job.progress.share:.0%}" if job.step == "compress" else ""
        return f"{job.step or 'running'}{share}"
    return job.state


def _target(job: "Job") -> str:
    return str(job.request["target"] or "-")


@app.command()
def show(
    job: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until it ends.")] = False,
    logs: Annotated[bool, typer.Option("--log", help="And all that happened.")] = False,
    user: User = None,
    as_json: Json = False,
) -> None:
    """A job: its state, its steps, what went wrong or came out."""
    with _service() as service:
        user, seen = engine_service.user(user), 0
        name = _found(service, job, user)
        while logs or follow:
            found = service.status(name, user)
            for event in service.events(name, user, since=seen):
                seen = event.number
                log().print(_line(event), markup=False)
            if found.is_final or not follow:
                break
            time.sleep(1.0)
        found = service.status(name, user)
        print_json(asdict(found)) if as_json else print_facts(data(), _facts(found))


def _line(event: "Event") -> str:
    said = " ".join(f"{key}={value}" for key, value in event.data.items() if value not in (None, []))
    return f"{time.strftime('%H:%M:%S', time.localtime(event.time))} {event.kind} {event.data.get('text') or said}"


def _facts(job: "Job") -> dict[str, str | None]:
    eta = job.progress.eta
    return {
        "job": job.id,
        "state": _state(job) + (f", {duration(eta)} left" if job.step == "compress" and eta is not None else ""),
        "model": f"{job.request['model']} @ {str(job.revision)[:10]}",
        "recipe": str(job.request["recipe"]["name"]),
        "target": job.request["target"],
        "attempt": str(job.attempt) if job.attempt > 1 else None,
        "steps": ", ".join(f"{step.name} {_mark(step.state, step.seconds)}" for step in job.steps),
        "pushed": job.pushed and job.pushed.url,
        "failed": job.failure and job.failure.message,
        "hint": job.failure and job.failure.hint,
    }


def _mark(state: str, seconds: float | None) -> str:
    return duration(seconds) if state == "done" and seconds is not None else state


def _change(name: str, job: str, user: str | None, **more: Any) -> None:
    with _service() as service:
        changed: Job = getattr(service, name)(
            _found(service, job, engine_service.user(user)), engine_service.user(user), **more
        )
        print_facts(data(), {"job": changed.id, "state": _state(changed)})


@app.command()
def cancel(job: Id, user: User = None) -> None:
    """Stop a job. Its finished layers are kept for a day."""
    _change("cancel", job, user)


@app.command()
def resume(job: Id, user: User = None) -> None:
    """Go on with a job that was cancelled or failed; push one that waits for a review."""
    _change("resume", job, user, token=engine_service.token())


@app.command()
def retry(job: Id, user: User = None) -> None:
    """Begin a job anew, from nothing."""
    _change("retry", job, user, token=engine_service.token())


@app.command()
def publish(job: Id, user: User = None) -> None:
    """Let everybody see what a finished job pushed to a private repository."""
    _change("publish", job, user, token=engine_service.token())


@app.command()
def delete(job: Id, user: User = None) -> None:
    """Forget a job that has ended. What was pushed stays."""
    with _service() as service:
        service.delete(_found(service, job, engine_service.user(user)), engine_service.user(user))
