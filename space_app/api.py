"""The same for programs: over HTTP with gradio's clients, and as tools of the Model Context Protocol.

Callers send a token of the Hub in the header `Authorization: Bearer ...`; they see and touch their own jobs only.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from typing import Any

import gradio as gr
from gradio.events import api

from hfquant.conversion.request import Request
from hfquant.conversion.service import Service
from hfquant.errors import HfquantError, RequestError
from space_app import convert
from space_app.login import Login

USUAL = int(Request.model_fields["priority"].default)


def expose(service: Service, login: Login) -> None:
    """Make the calls known to the page that is being built."""

    def preview(conversion: dict[str, Any], http: gr.Request) -> dict[str, Any]:
        """What a conversion would cost and give, and what stands in its way. Nothing is started.

        Args:
            conversion: {"model": "namespace/name", "recipe": "gptq-w4g64", "target": "namespace/name"}, and more.
        """
        caller = login.caller(http)
        found = service.preview(
            fair(conversion, login), user=caller.user if caller else None, token=caller.token if caller else None
        )
        return {**asdict(found), "allowed": found.allowed}

    def submit(conversion: dict[str, Any], http: gr.Request) -> dict[str, Any]:
        """Ask for a conversion. An equal one of the same user is the same job.

        Args:
            conversion: {"model": "namespace/name", "recipe": "gptq-w4g64", "target": "namespace/name"}, and more.
        """
        caller = login.required(http)
        return asdict(service.submit(fair(conversion, login), caller.user, caller.token, expires=caller.expires))

    def status(job: str, http: gr.Request) -> dict[str, Any]:
        """How a job of yours stands: its state, steps, progress, failure, and where it was pushed.

        Args:
            job: what `submit` returned as `id`.
        """
        return asdict(service.status(job, login.required(http).user))

    def jobs(http: gr.Request) -> list[dict[str, Any]]:
        """All your jobs, newest first."""
        return [asdict(job) for job in service.jobs(login.required(http).user)]

    def report(job: str, http: gr.Request) -> dict[str, Any]:
        """All that was measured of a job of yours.

        Args:
            job: what `submit` returned as `id`.
        """
        return service.report(job, login.required(http).user) or {}

    def cancel(job: str, http: gr.Request) -> dict[str, Any]:
        """Stop a job of yours. What is finished of it is kept for a day, and `resume` goes on from there.

        Args:
            job: what `submit` returned as `id`.
        """
        return asdict(service.cancel(job, login.required(http).user))

    def resume(job: str, http: gr.Request) -> dict[str, Any]:
        """Go on with a job of yours that was cancelled or failed; push one that waits for it.

        Args:
            job: what `submit` returned as `id`.
        """
        caller = login.required(http)
        return asdict(service.resume(job, caller.user, caller.token, expires=caller.expires))

    def publish(job: str, http: gr.Request) -> dict[str, Any]:
        """Let everybody see the private repository that a finished job of yours pushed.

        Args:
            job: what `submit` returned as `id`.
        """
        caller = login.required(http)
        return asdict(service.publish(job, caller.user, caller.token))

    for call in (preview, submit, status, jobs, report, cancel, resume, publish):
        api(_said(call), api_name=call.__name__, queue=False)


def fair(conversion: dict[str, Any], login: Login) -> dict[str, Any]:
    """A conversion as it was asked for.  Raises RequestError, where others use the service too, for what is not theirs
    to choose: to go before them, and the machines of whoever runs it."""
    if not isinstance(conversion, dict):
        raise RequestError("a conversion should be an object", 'such as {"model": "org/model", "recipe": "rtn-w8"}')
    if login.hub and isinstance(urgency := conversion.get("priority", USUAL), int) and urgency < USUAL:
        raise RequestError("`priority` below 50 goes before other people", "leave it out, or give 50 to 100")
    if login.hub and conversion.get("executor", "local") not in convert.EXECUTORS.values():
        said = f"`executor` should be one of {', '.join(convert.EXECUTORS.values())}"
        raise RequestError(said, "others are for whoever runs this service")
    return conversion


def _said(call: Callable[..., Any]) -> Callable[..., Any]:
    """Our errors, in words, to whoever called."""

    @wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except HfquantError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return wrapped
