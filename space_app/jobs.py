"""The second tab: how a conversion goes, what came of it, and those before."""

import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from hfquant.conversion.job import Event, Job
from hfquant.conversion.service import Service
from hfquant.errors import HfquantError
from hfquant.measure.markdown import code
from space_app import plots, views
from space_app.convert import Form
from space_app.login import Caller, Login

SHOWN = 400  # lines of the log
EVERY = 1.0  # seconds
HISTORY = 50
LOGGED_OUT = "**Log in to see your jobs.** They go on while nobody looks."
NONE_YET = "**No jobs yet.** Begin one under *Convert*: it shows here, today and when you come back."
NOTHING: dict[str, Any] = {"job": None, "state": None, "number": 0, "layers": {}, "log": []}
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
RETRIES = ("failed", "cancelled", "done")
BUTTONS = ("cancel", "resume", "publish", "retry", "again", "delete")
SURE = "(job) => confirm('Everybody will see the repository, and may copy it. Make it public?') ? job : null"
TICKING = ("seen", "turned", "headline", "steps", "log", "errors_place", "errors")
FILLED = ("seen", "timer", "chosen", "headline", "steps", "errors_place", "errors", "log", *BUTTONS, "result",
          "comparison", "before", "after", "card", "details", "all", "history", "compared_place",
          "compared")  # fmt: skip


@dataclass
class Jobs:
    """The tab, and how it is filled."""

    service: Service
    login: Login
    job: gr.BrowserState
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def seen(self) -> gr.State:
        return self.parts["seen"]

    def places(self, names: Sequence[str]) -> list[Any]:
        return [self.parts[name] for name in names]

    def show(self, job: str | None, seen: dict[str, Any], http: gr.Request) -> list[Any]:
        """Everything about the chosen job, and the list of all: on arrival, and when something was asked for."""
        caller = self.login.caller(http)
        if caller is None:
            return _empty(LOGGED_OUT)
        found = self.service.jobs(caller.user, limit=HISTORY)
        if not found:
            return _empty(NONE_YET)
        chosen = job if job in {one.id for one in found} else found[0].id
        reports = {one.id: self.service.report(one.id, caller.user) for one in found if one.has_report}
        now = self.service.status(chosen, caller.user)
        return _fill(
            FILLED,
            {
                "chosen": gr.update(choices=[(_label(one), one.id) for one in found], value=chosen, visible=True),
                "details": gr.update(visible=True),
                "all": gr.update(visible=True),
                "history": views.history(found, reports),
            }
            | self._watched(now, caller, NOTHING)
            | _offered(now)
            | self._result(now, caller)
            | plots.of_results(found, reports),
        )

    def tick(self, seen: dict[str, Any], http: gr.Request) -> list[Any]:
        """What is new of the job that is shown; `turned` is another if all has to be shown anew.

        Little is filled here: gradio takes half a millisecond for every part that an event may fill, even for those it
        leaves, and many people's pages ask every second.
        """
        caller, job = self.login.caller(http), seen["job"]
        if caller is None or job is None:
            return _fill(TICKING, {"turned": _now()})
        try:
            new = self._watched(self.service.status(job, caller.user), caller, seen)
        except HfquantError as error:
            return _fill(TICKING, {"turned": _now(), "headline": views.failure(error)})
        if new["seen"]["state"] != seen.get("state"):
            return _fill(TICKING, {"turned": _now()})
        return _fill(TICKING, new)

    def _watched(self, now: Job, caller: Caller, seen: dict[str, Any]) -> dict[str, Any]:
        """How it goes with a job."""
        new = seen["job"] != now.id
        fresh = self.service.events(now.id, caller.user, 0 if new else seen["number"])
        seen = _after({**NOTHING, "job": now.id} if new else seen, fresh) | {"state": now.state}
        filled = {"seen": seen, "headline": views.headline(now), "steps": views.stepper(now)}
        if new or fresh:  # nothing is drawn again that has not changed
            filled |= {"log": "\n".join(seen["log"])} | plots.of_layers(seen["layers"])
        return filled

    def _result(self, job: Job, caller: Caller) -> dict[str, Any]:
        report = self.service.report(job.id, caller.user) if job.is_final and job.has_report else None
        if report is None:
            return {"result": gr.update(visible=False)}
        sample = report.get("sample") or {}
        place = self.service.result(job.id, caller.user)
        text = views.comparison(report)
        if place is not None and not self.login.hub:
            text += f"\n\nIt lies in {code(str(place))}"
        prompt = str(sample.get("prompt") or "")
        before, after = (prompt + str(sample[name]) if sample.get(name) else "" for name in ("original", "compressed"))
        figures = {
            name: f"data:image/png;base64,{b64encode(content).decode()}"
            for name, content in self.service.figures(job.id, caller.user).items()
        }
        card = views.card(self.service.card(job.id, caller.user) or "", figures)
        return {
            "result": gr.update(visible=True), "comparison": text, "before": before, "after": after, "card": card,
        }  # fmt: skip

    def refresh(self, event: Any) -> None:
        """After an event, show everything anew."""
        event.then(self.show, [self.job, self.seen], self.places(FILLED), **QUIET)

    def connect(self, tabs: gr.Tabs, form: Form) -> None:
        """What happens when a button is pressed, a job chosen, a second has passed."""
        parts = self.parts
        parts["timer"].tick(self.tick, self.seen, self.places(TICKING), trigger_mode="once", **QUIET)
        parts["turned"].change(self.show, [self.job, self.seen], self.places(FILLED), **QUIET)
        chosen = parts["chosen"].input(lambda job: job, parts["chosen"], self.job, **QUIET)
        self.refresh(chosen)
        for name, act in self._actions().items():
            asked = {"js": SURE} if name == "publish" else {}
            self.refresh(parts[name].click(act, parts["chosen"], parts["said"], **asked, **QUIET))
        parts["again"].click(self._again, parts["chosen"], [form.model, tabs, parts["said"]], **QUIET)

    def _actions(self) -> dict[str, Callable[..., str]]:
        def acting(act: Callable[[str, Caller], Any]) -> Callable[..., str]:
            def run(job: str | None, http: gr.Request) -> str:
                if job is None:  # asked whether they are sure, they were not
                    return ""
                try:
                    act(job, self.login.required(http))
                except HfquantError as error:
                    return views.failure(error)
                return ""

            return run

        service = self.service
        return {
            "cancel": acting(lambda job, who: service.cancel(job, who.user)),
            "resume": acting(lambda job, who: service.resume(job, who.user, who.token, expires=who.expires)),
            "retry": acting(lambda job, who: service.retry(job, who.user, who.token, expires=who.expires)),
            "publish": acting(lambda job, who: service.publish(job, who.user, who.token)),
            "delete": acting(lambda job, who: service.delete(job, who.user)),
        }

    def _again(self, job: str, http: gr.Request) -> tuple[Any, Any, str]:
        try:
            found = self.service.status(job, self.login.required(http).user)
        except HfquantError as error:
            return gr.skip(), gr.skip(), views.failure(error)
        return found.request["model"], gr.update(selected="convert"), ""


def build(service: Service, login: Login, job: gr.BrowserState) -> Jobs:
    """The tab's content."""
    tab = Jobs(service, login, job)
    parts = tab.parts
    # not a state: of those that change without the queue the page is not told
    parts["turned"] = gr.Textbox(visible="hidden", elem_id="turned", label="When the job turned")
    parts["seen"], parts["timer"] = gr.State(dict(NOTHING)), gr.Timer(EVERY, active=False)
    parts["chosen"] = gr.Dropdown([], label="Job", elem_id="chosen", visible=False)
    parts["headline"] = gr.Markdown("No jobs yet.", elem_id="headline")
    parts["steps"] = gr.HTML(elem_id="steps")
    with gr.Row():
        for name, label in (("cancel", "Cancel"), ("resume", "Resume"), ("publish", "Make it public"),
                            ("retry", "Begin anew"), ("again", "Another recipe"),
                            ("delete", "Forget this job")):  # fmt: skip
            parts[name] = gr.Button(label, visible=False, elem_id=name, size="md",
                                    scale=0, min_width=200,
                                    variant="stop" if name == "cancel" else "secondary")  # fmt: skip
    parts["said"] = gr.Markdown(elem_id="said")
    with gr.Column(visible=False, elem_id="result") as parts["result"]:
        parts["comparison"] = gr.Markdown(elem_id="comparison", elem_classes="plain")
        with gr.Row():
            parts["before"] = gr.Textbox(label="The original writes", lines=4, interactive=False, elem_id="before")
            parts["after"] = gr.Textbox(label="The compressed one writes", lines=4, interactive=False, elem_id="after")
        with gr.Accordion("The card", open=False):
            parts["card"] = gr.Markdown(elem_id="card", elem_classes="card")
    plots.errors(parts)
    with gr.Accordion("Log", open=False, visible=False) as parts["details"]:
        parts["log"] = gr.Textbox(
            lines=12, max_lines=12, interactive=False, label="Log", elem_id="log", autoscroll=True
        )
    with gr.Column(visible=False) as parts["all"]:
        gr.Markdown("### All your jobs")
        parts["history"] = gr.Markdown(elem_id="history", elem_classes="plain")
    plots.compared(parts)  # beside the column, not in it: with a column it would be shown
    return tab


def _after(seen: Mapping[str, Any], fresh: Sequence[Event]) -> dict[str, Any]:
    """What is known of a job after some more events."""
    layers, log, number = dict(seen["layers"]), list(seen["log"]), seen["number"]
    for event in fresh:
        number = max(number, event.number)
        data = event.data
        if event.kind == "layer" and data.get("error") is not None:
            layers[data["name"]] = data["error"]  # told again by a job that goes on: it is the same layer
        text = data.get("text") or (f"{data.get('name')}: {data.get('state')}" if event.kind == "step" else None)
        if text:
            log.append(str(text))
    return {"job": seen["job"], "number": number, "layers": layers, "log": log[-SHOWN:]}


def _is_private(job: Job) -> bool:
    """Whether it pushed to a repository that only some may see."""
    return bool(job.pushed and job.pushed.private and not job.pushed.pull_request)


def _now() -> str:
    """Never the same twice."""
    return str(time.monotonic())


def _offered(job: Job) -> dict[str, Any]:
    """What can be done with a job in its state."""
    return {
        "timer": gr.update(active=not job.is_final),
        "cancel": gr.update(visible=job.state in ("queued", "running")),
        "resume": gr.update(
            visible=job.state in ("failed", "cancelled", "review"),
            value="Push it" if job.state == "review" else "Resume",
        ),
        "publish": gr.update(visible=job.state == "done" and _is_private(job)),
        "retry": gr.update(visible=job.state in RETRIES),
        "again": gr.update(visible=True),
        "delete": gr.update(visible=job.is_final),
    }


def _label(job: Job) -> str:
    return f"{job.request['model']} · {views.recipe(job)} · {job.state}"


def _fill(names: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
    """In the order of the names; what is not given stays as it is."""
    return [values.get(name, gr.skip()) for name in names]


def _empty(text: str) -> list[Any]:
    """No job, and why."""
    hidden = gr.update(visible=False)
    gone = dict.fromkeys(("chosen", *BUTTONS, "result", "details", "all"), hidden)
    said = {"seen": dict(NOTHING), "timer": gr.update(active=False), "headline": text, "steps": ""}
    return _fill(FILLED, gone | plots.none() | said)
