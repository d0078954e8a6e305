"""The page and its server.  `hfquant space` starts it; on the Hub, this file does."""

import os

# before gradio and huggingface_hub are imported: they read these then
for name, value in {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
}.items():
    os.environ.setdefault(name, value)

import argparse  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import fastapi  # noqa: E402
import gradio as gr  # noqa: E402
import uvicorn  # noqa: E402
from cryptography.fernet import Fernet  # noqa: E402
from huggingface_hub import get_token  # noqa: E402

from hfquant.conversion.fleet.manifest import read_manifest  # noqa: E402
from hfquant.conversion.fleet.serve import attached  # noqa: E402
from hfquant.conversion.service import Service  # noqa: E402
from hfquant.conversion.settings import Settings  # noqa: E402
from hfquant.errors import ResourceError  # noqa: E402
from hfquant.measure.markdown import code  # noqa: E402
from space_app import api, calm, convert, examples, first_look, fleet, jobs, look, zero  # noqa: E402
from space_app.login import Login  # noqa: E402
from space_app.worker import Worker  # noqa: E402

INTRODUCTION = """# hfquant
Pick a model of the Hub and a recipe; see what the result will weigh, need and cost; start, close the page, come back.
The result is measured against the original and pushed with a card that says what was lost."""


def build(service: Service, login: Login, kept: fleet.Fleet | None = None) -> gr.Blocks:
    """The page on a service."""
    calm.apply()
    with gr.Blocks(title="hfquant") as page:
        job = gr.BrowserState(None, storage_key="hfquant-job")
        with gr.Row(elem_id="head"):
            with gr.Column(min_width=300):
                gr.Markdown(INTRODUCTION)
            with gr.Column(scale=0, min_width=240):
                if login.hub:
                    gr.LoginButton(elem_id="login")
                status = gr.Markdown(elem_id="status")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Convert", id="convert"):
                form = convert.build(service, login)
                if zero.here():
                    first_look.build(form, service, login)
            with gr.Tab("Jobs", id="jobs"):
                watched = jobs.build(service, login, job)
            with gr.Tab("Examples", id="examples", elem_id="examples"):
                examples.build()
            if kept is not None:
                with gr.Tab("Fleet", id="fleet") as tab:
                    fleet.build(kept, tab)
        convert.connect(form, service, login, job, tabs, watched.refresh)
        watched.connect(tabs, form)
        api.expose(service, login)

        def arrive(http: gr.Request) -> tuple[str, Any]:
            return _status(login, http), convert.owners(login, http)

        page.load(arrive, None, [status, form.owner], **jobs.QUIET)
        page.load(watched.show, [job, watched.seen], watched.places(jobs.FILLED), **jobs.QUIET)
    return page


def _status(login: Login, http: gr.Request) -> str:
    caller = login.caller(http)
    if caller is None:
        return "Not logged in: you can look at models and costs, and at examples."
    return f"Logged in as {code(caller.user)}" if login.hub else "For you, on this machine"


def create(
    service: Service, login: Login, kept: fleet.Fleet | None = None, hooks: fastapi.APIRouter | None = None
) -> fastapi.FastAPI:
    """The server: the page at `/`, its API below it; a fleet's state, and the route of a webhook."""
    app = fastapi.FastAPI(title="hfquant", docs_url=None, redoc_url=None, openapi_url=None)
    for routes in (hooks, kept.routes() if kept is not None else None):
        if routes is not None:
            app.include_router(routes)
    page = build(service, login, kept)
    page.queue(default_concurrency_limit=16, max_size=200)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=look.theme(),
        css_paths=look.STYLE,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        max_file_size="1mb",
        ssr_mode=False,
        mcp_server=os.environ.get("GRADIO_MCP_SERVER") == "True",
        show_error=False,
        app_kwargs={"openapi_url": None},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until interrupted, with a worker beside.  Raises LoginError for an address that is not safe."""
    on_space = bool(os.environ.get("SPACE_ID"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="0.0.0.0" if on_space else "127.0.0.1")
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "7860")))
    parser.add_argument("--fleet", type=Path, default=os.environ.get("HFQUANT_FLEET"))
    given = parser.parse_args(arguments)
    serve(given.host, given.port, given.fleet)


def serve(host: str, port: int, manifest: Path | None = None) -> None:
    """The page, its API and a worker, until interrupted.

    manifest: of a fleet that is shown; with HFQUANT_WEBHOOK_SECRET, `/webhooks/hub` keeps it up to date.

    Raises LoginError, ResourceError for an address that is taken, FleetError for a manifest, before anything is begun.
    """
    login = Login()
    login.may_listen(host)
    _can_listen(host, port)
    if manifest:
        read_manifest(Path(manifest))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again at its end: the worker ends first
    settings = Settings.read(own_login=not login.hub)
    if settings.secret is None:
        settings = Settings.read(own_login=not login.hub, secret=Fernet.generate_key().decode())
    with ExitStack() as stack:
        service = stack.enter_context(Service(settings))
        service.warm()
        stack.enter_context(Worker(settings))
        kept = fleet.Fleet(Path(manifest), service, login) if manifest else None
        secret = os.environ.get("HFQUANT_WEBHOOK_SECRET")
        hooks = None
        if kept is not None and secret:
            own = get_token() if login.hub else None  # elsewhere the worker has this machine's login
            hooks = stack.enter_context(attached(kept.manifest, service, secret, kept.user, own))
        app = create(service, login, kept, hooks)
        zero.report()
        uvicorn.run(app, host=host, port=port, log_level="warning")


def _can_listen(host: str, port: int) -> None:
    """Raises ResourceError where nobody can be answered: at none of the addresses that the host's name stands for."""
    said = f"the page cannot answer on {host}, port {port}"
    if not 0 <= port <= 65535:
        raise ResourceError(f"{said}: there is no such port", "give a `--port` up to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ResourceError(f"{said}: {why}", "give the name or an address of this machine as `--host`") from error
    failed: OSError | None = None
    for family, _, _, _, address in found:
        try:
            socket.create_server(address, family=family).close()
            return
        except OSError as error:
            failed = failed or error
    assert failed is not None  # getaddrinfo never finds nothing
    raise ResourceError(f"{said}: {failed.strerror}", "end what answers there, or give another `--port`") from failed


if __name__ == "__main__":
    main()
