"""The fourth tab, where a fleet is kept: what of it is converted, stale or failed, and why.  The same as a page that
stands alone, and as JSON, for other sites to show."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import fastapi
import gradio as gr
from fastapi.responses import HTMLResponse, JSONResponse
from huggingface_hub import constants

from hfquant.conversion.fleet import status
from hfquant.conversion.fleet.manifest import read_manifest
from hfquant.conversion.fleet.reconcile import Plan, make_plan
from hfquant.conversion.fleet.sight import HubSight, Sight
from hfquant.conversion.service import Service
from hfquant.errors import HfquantError
from space_app import views
from space_app.login import OWN, Login

KEPT = 300.0  # seconds that an answer is good for: everybody may look, and each plan asks the Hub about every pair
OF_THE_SPACE = ":fleet"  # owns the fleet's jobs where people log in; no name of a user has a colon


@dataclass
class Fleet:
    """A manifest, compared with the Hub when somebody looks.

    Where people log in, only what everybody may see is looked at, whatever the Space's own token could read.
    """

    manifest: Path
    service: Service
    login: Login
    sight: Sight | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _seen: tuple[float, Plan] | None = None

    @property
    def user(self) -> str:
        """Who owns the fleet's jobs."""
        return OF_THE_SPACE if self.login.hub else OWN

    def plan(self) -> Plan:
        """Raises HfquantError where the manifest cannot be read or the Hub not be asked."""
        with self._lock:
            if self._seen is None or time.monotonic() - self._seen[0] > KEPT:
                sight = self.sight or HubSight(False if self.login.hub else None)
                jobs, limits = self.service.jobs(self.user, limit=100_000), self.service.settings.limits
                plan = make_plan(read_manifest(self.manifest), sight, jobs=jobs, limits=limits)
                self._seen = time.monotonic(), plan
            return self._seen[1]

    def routes(self) -> fastapi.APIRouter:
        """`/fleet.html` and `/fleet.json`"""
        router = fastapi.APIRouter()

        def answer() -> Plan:
            try:
                return self.plan()
            except HfquantError as error:
                raise fastapi.HTTPException(503, str(error)) from error

        @router.get("/fleet.html")
        def page() -> HTMLResponse:
            """The export of `hfquant fleet status --html`, as it is now; it may load nothing."""
            closed = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
            return HTMLResponse(status.page(answer(), constants.ENDPOINT), headers=closed)

        @router.get("/fleet.json")
        def document() -> JSONResponse:
            return JSONResponse(status.document(answer()))

        return router


def build(fleet: Fleet, tab: gr.Tab) -> None:
    """The tab's content, asked for when the tab is opened."""
    text = gr.Markdown("Asking the Hub …", elem_id="fleet", elem_classes="plain")

    def show() -> str:
        try:
            shown = status.markdown(fleet.plan(), constants.ENDPOINT)
        except HfquantError as error:
            return views.failure(error)
        return shown + "\n\nThe same [as a page](/fleet.html) and [as JSON](/fleet.json)."

    tab.select(show, None, text, api_visibility="private")
