"""`hfquant fleet` and `hfquant webhooks`"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FleetError
from . import engine_service
from .arguments import Json
from .output import busy, log, print_json, print_table

if TYPE_CHECKING:
    from ..conversion.fleet.manifest import Manifest
    from ..conversion.fleet.reconcile import Plan
    from ..conversion.service import Service

fleet = typer.Typer(name="fleet", no_args_is_help=True, help="Keep many models converted, as one file says.")
webhooks = typer.Typer(name="webhooks", no_args_is_help=True, help="Convert when the Hub tells of a new commit.")

File = Annotated[Path, typer.Option("--manifest", "-m", metavar="FILE", help="The fleet's YAML file.")]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="GLOB", help="Models, recipes or targets; may be given several times."),
]
FAILED, DRIFT = 1, 2


@fleet.command("plan")
def plan(
    manifest: File = Path("fleet.yaml"),
    only: Only = None,
    due: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Print where results are due, at most N, as JSON. Exit code 0."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare what is wanted with what is on the Hub; change nothing. Exit code 2 if anything differs."""
    with _service() as service:
        found = _plan(manifest, service, only)
    if due is not None:
        print(json.dumps([verdict.wanted.target for verdict in found.due[:due]]))
        return
    _show(found, as_json)
    if found.drift:
        raise typer.Exit(DRIFT)


@fleet.command("apply")
def apply(
    manifest: File = Path("fleet.yaml"),
    only: Only = None,
    most: Annotated[int | None, typer.Option("--max", min=1, metavar="N", help="Begin at most so many.")] = None,
    as_json: Json = False,
) -> None:
    """Enqueue exactly what is missing or stale. Again, it does nothing twice. A `hfquant worker` does the work."""
    from ..conversion.fleet import reconcile

    with _service() as service:
        found = _plan(manifest, service, only)
        asked = reconcile.apply(found, service, engine_service.user(), engine_service.token(), most=most)
    if as_json:
        print_json([{"model": a.verdict.wanted.model, "recipe": a.verdict.wanted.recipe,
                     "target": a.verdict.wanted.target, "job": a.job, "created": a.created, "error": a.error}
                    for a in asked])  # fmt: skip
    else:
        rows = [[a.verdict.wanted.model, a.verdict.wanted.recipe, a.job or "-", a.error or ""] for a in asked]
        print_table(["model", "recipe", "job", "refused"], rows)
        left = len(found.due) - sum(a.job is not None for a in asked)
        log().print(f"{len(asked) - sum(a.error is not None for a in asked)} enqueued, {left} left")
    if any(a.error for a in asked):
        raise typer.Exit(DRIFT)


@fleet.command("status")
def status(
    manifest: File = Path("fleet.yaml"),
    only: Only = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="DIR", help="Write index.html and fleet.json.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 if a conversion failed.")] = False,
    as_json: Json = False,
) -> None:
    """What is converted, stale, running, failed, and why; as a page too."""
    from huggingface_hub import constants

    from ..conversion.fleet import status as shown

    with _service() as service:
        found = _plan(manifest, service, only)
    if html is not None:
        for path in shown.export(found, html, constants.ENDPOINT):
            log().print(f"{path}")
    _show(found, as_json)
    if check and "failed" in found.counts():
        raise typer.Exit(FAILED)


@fleet.command("schema")
def schema() -> None:
    """Print the JSON schema of fleet files."""
    from ..conversion.fleet.manifest import Manifest

    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()})


@webhooks.command("serve")
def serve(
    manifest: File = Path("fleet.yaml"),
    host: Annotated[str, typer.Option(metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N")] = 7861,
) -> None:
    """Answer the Hub's webhooks at `/webhooks/hub`; the secret is in HFQUANT_WEBHOOK_SECRET."""
    import uvicorn
    from fastapi import FastAPI

    from ..conversion.fleet.serve import attached

    app, token = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), engine_service.token()
    with (
        _service() as service,
        attached(manifest, service, os.environ.get("HFQUANT_WEBHOOK_SECRET"), engine_service.user(), token) as routes,
    ):
        app.include_router(routes)
        log().print(f"http://{host}:{port}/webhooks/hub")
        uvicorn.run(app, host=host, port=port, log_level="warning")


@webhooks.command("create")
def create(
    manifest: File = Path("fleet.yaml"),
    job: Annotated[str | None, typer.Option(metavar="ID", help="A Job to begin: no server is needed.")] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Or where `webhooks serve` answers.")] = None,
    as_json: Json = False,
) -> None:
    """Have the Hub tell of new commits of the fleet's models: by beginning a Job again, or at a server of yours."""
    from ..conversion.fleet.watching import watch
    from ..conversion.fleet.webhook import check_secret

    if (job is None) == (url is None):
        raise FleetError("a webhook begins a Job or calls a server", "give either `--job ID` or `--url URL`")
    secret = check_secret(os.environ.get("HFQUANT_WEBHOOK_SECRET"))
    made = watch(_read(manifest), secret, job=job, url=url)
    if as_json:
        print_json(made)
    else:
        print_table(["webhook", "watches"], [[made["id"], ", ".join(made["watched"])]])


def _service() -> "Service":
    """On this machine's database.  What a fleet asks for is its publisher's own, so their queue may be long."""
    return engine_service.service(queued_per_user=100_000, jobs_per_day=100_000, queued=100_000)


def _read(manifest: Path) -> "Manifest":
    from ..conversion.fleet.manifest import read_manifest

    return read_manifest(manifest)


def _plan(manifest: Path, service: "Service", only: list[str] | None) -> "Plan":
    from ..conversion.fleet.reconcile import make_plan
    from ..conversion.fleet.sight import HubSight

    wanted = _read(manifest)
    with busy("asking the Hub"):
        jobs = service.jobs(engine_service.user(), limit=100_000)
        return make_plan(wanted, HubSight(), jobs=jobs, limits=service.settings.limits).only(only or ())


def _show(found: "Plan", as_json: bool) -> None:
    from ..conversion.fleet import status as shown

    if as_json:
        print_json(shown.document(found))
        return
    print_table(shown.COLUMNS, [shown.line(verdict) for verdict in found.verdicts])
    counts: dict[str, Any] = found.counts()
    text = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    money = f"; at most ${found.usd:.2f}" if found.usd else ""
    log().print(f"{text}; {len(found.due)} to do{money}")
