"""The second tab: how a conversion goes, what came of it, and those before."""

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
NOTHING: dict[str, Any] = {"job": None, "number": 0, "layers": {}, "log": []}
RETRIES = ("failed", "cancelled", "done")
BUTTONS = ("cancel", "resume", "publish", "retry", "again", "delete")
SURE = "(job) => confirm('Everybody will see the repository, and may copy it. Make it public?') ? job : null"
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

    @property
    def outputs(self) -> list[Any]:
        """What `show` and `tick` fill, in the order of `FILLED`."""
        return [self.parts[name] for name in FILLED]

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
        return _fill(
            self._watched(chosen, caller, NOTHING)
            | {
                "chosen": gr.update(choices=[(_label(one), one.id) for one in found], value=chosen, visible=True),
                "details": gr.update(visible=True),
                "all": gr.update(visible=True),
                "history": views.history(found, reports),
            }
            | plots.of_results(found, reports)
        )

    def tick(self, seen: dict[str, Any], http: gr.Request) -> list[Any]:
        """What is new of the job that is shown; the list is left alone."""
        caller, job = self.login.caller(http), seen["job"]
        if caller is None or job is None:
            return _empty(LOGGED_OUT)
        try:
            new = self._watched(job, caller, seen)
        except HfquantError as error:
            return _empty(views.failure(error))
        if not new["timer"]["active"]:  # it has just ended: the list says so too
            return self.show(job, seen, http)
        return _fill(new)

    def _watched(self, job: str, caller: Caller, seen: dict[str, Any]) -> dict[str, Any]:
        """What is to be seen of one job."""
        now = self.service.status(job, caller.user)
        new = seen["job"] != job
        fresh = self.service.events(job, caller.user, 0 if new else seen["number"])
        seen = _after({**NOTHING, "job": job} if new else seen, fresh)
        filled = {
            "seen": seen,
            "timer": gr.update(active=not now.is_final),
            "headline": views.headline(now),
            "steps": views.stepper(now),
            "cancel": gr.update(visible=now.state in ("queued", "running")),
            "resume": gr.update(
                visible=now.state in ("failed", "cancelled", "review"),
                value="Push it" if now.state == "review" else "Resume",
            ),
            "publish": gr.update(visible=now.state == "done" and _is_private(now)),
            "retry": gr.update(visible=now.state in RETRIES),
            "again": gr.update(visible=True),
            "delete": gr.update(visible=now.is_final),
            "result": gr.update(visible=False),
        }
        if new or fresh:  # nothing is drawn again that has not changed
            filled |= {"log": "\n".join(seen["log"])} | plots.of_layers(seen["layers"])
        return filled | (self._result(now, caller) if now.is_final and now.has_report else {})

    def _result(self, job: Job, caller: Caller) -> dict[str, Any]:
        report = self.service.report(job.id, caller.user)
        if report is None:
            return {}
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
        event.then(self.show, [self.job, self.seen], self.outputs, queue=False, show_progress="hidden",
                   api_visibility="private")  # fmt: skip

    def connect(self, tabs: gr.Tabs, form: Form) -> None:
        """What happens when a button is pressed, a job chosen, a second has passed."""
        parts, quiet = self.parts, {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        parts["timer"].tick(self.tick, self.seen, self.outputs, trigger_mode="once", **quiet)
        chosen = parts["chosen"].input(lambda job: job, parts["chosen"], self.job, **quiet)
        self.refresh(chosen)
        for name, act in self._actions().items():
            asked = {"js": SURE} if name == "publish" else {}
            self.refresh(parts[name].click(act, parts["chosen"], parts["said"], **asked, **quiet))
        parts["again"].click(self._again, parts["chosen"], [form.model, tabs, parts["said"]], **quiet)

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


def _label(job: Job) -> str:
    return f"{job.request['model']} · {views.recipe(job)} · {job.state}"


def _fill(values: Mapping[str, Any]) -> list[Any]:
    """In the order of `FILLED`; what is not named stays as it is."""
    return [values.get(name, gr.skip()) for name in FILLED]


def _empty(text: str) -> list[Any]:
    """No job, and why."""
    hidden = gr.update(visible=False)
    gone = dict.fromkeys(("chosen", *BUTTONS, "result", "details", "all"), hidden)
    return _fill(
        gone | plots.none() | {"seen": dict(NOTHING), "timer": gr.update(active=False), "headline": text, "steps": ""}
    )
