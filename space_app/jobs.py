"""The second tab: how a conversion goes, what came of it, and those before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import pandas as pd

from hfquant.conversion.job import Event, Job
from hfquant.conversion.service import Service
from hfquant.errors import HfquantError
from hfquant.measure.markdown import code
from space_app import views
from space_app.convert import Form
from space_app.login import Caller, Login

SHOWN = 400  # lines of the log
EVERY = 1.0  # seconds
LAYER = ["layer", "error", "name"]
COMPARED = ["megabytes", "perplexity ratio", "recipe"]
HISTORY = 50
LOGGED_OUT = "**Log in to see your jobs.** They go on while nobody looks."
NONE_YET = "**No jobs yet.** Begin one under *Convert*: it shows here, today and when you come back."
NOTHING: dict[str, Any] = {"job": None, "number": 0, "layers": {}, "log": []}
# not `False`: gradio's plot trips when it is taken off the page, and over a value that comes while it is not there
NO_PLOT: dict[str, Any] = gr.update(visible="hidden")
RETRIES = ("failed", "cancelled", "done")


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
        """What `show` fills, in its order."""
        names = ("seen", "timer", "chosen", "headline", "steps", "errors", "log", "cancel", "resume", "retry", "again",
                 "delete", "result", "comparison", "before", "after", "card", "details", "all", "history",
                 "compared")  # fmt: skip
        return [self.parts[name] for name in names]

    def show(self, job: str | None, seen: dict[str, Any], http: gr.Request) -> list[Any]:
        """Everything about the chosen job, and the list of all: on arrival, and when something was asked for."""
        caller = self.login.caller(http)
        if caller is None:
            return self._empty(LOGGED_OUT)
        found = self.service.jobs(caller.user, limit=HISTORY)
        if not found:
            return self._empty(NONE_YET)
        known = {one.id for one in found}
        chosen = job if job in known else found[0].id
        reports = {one.id: self.service.report(one.id, caller.user) for one in found if one.has_report}
        choices = [(_label(one), one.id) for one in found]
        listed = [*[gr.update(visible=True)] * 2, views.history(found, reports), _compared(found, reports)]
        first, rest = self._watch(chosen, caller, dict(NOTHING))
        return [*first, gr.update(choices=choices, value=chosen, visible=True), *rest, *listed]

    def tick(self, seen: dict[str, Any], http: gr.Request) -> list[Any]:
        """What is new of the job that is shown; the list is left alone."""
        caller, job = self.login.caller(http), seen["job"]
        if caller is None or job is None:
            return self._empty(LOGGED_OUT)
        try:
            first, rest = self._watch(job, caller, seen)
        except HfquantError as error:
            return self._empty(views.failure(error))
        if not first[1]["active"]:  # it has just ended: the list says so too
            return self.show(job, seen, http)
        return [*first, gr.skip(), *rest, *[gr.skip()] * 4]

    def _watch(self, job: str, caller: Caller, seen: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        """(seen, timer), (everything from the headline to the card)."""
        now = self.service.status(job, caller.user)
        new = seen["job"] != job
        fresh = self.service.events(job, caller.user, 0 if new else seen["number"])
        seen = _after({**NOTHING, "job": job} if new else seen, fresh)
        result = self._result(now, caller) if now.is_final else [gr.update(visible=False), *[gr.skip()] * 4]
        buttons = [
            gr.update(visible=now.state in ("queued", "running")),
            gr.update(visible=now.state in ("failed", "cancelled", "review"),
                      value="Push it" if now.state == "review" else "Go on where it stopped"),
            gr.update(visible=now.state in RETRIES),
            gr.update(visible=True),
            gr.update(visible=now.is_final),
        ]  # fmt: skip
        told: list[Any] = [gr.skip(), gr.skip()]  # nothing is drawn again that has not changed
        if new or fresh:
            rows = [(n, error, name) for n, (name, error) in enumerate(seen["layers"].items(), 1)]
            plot = pd.DataFrame(rows, columns=LAYER)
            told = [_plot(plot), "\n".join(seen["log"])]
        filled = [views.headline(now), views.stepper(now), *told, *buttons, *result]
        return [seen, gr.update(active=not now.is_final)], filled

    def _result(self, job: Job, caller: Caller) -> list[Any]:
        """(result, comparison, before, after, card)"""
        report = self.service.report(job.id, caller.user) if job.has_report else None
        if report is None:
            return [gr.update(visible=False), *[gr.skip()] * 4]
        sample = report.get("sample") or {}
        place = self.service.result(job.id, caller.user)
        text = views.comparison(report)
        if place is not None and not self.login.hub:
            text += f"\n\nIt lies in {code(str(place))}"
        prompt = str(sample.get("prompt") or "")
        texts = [prompt + str(sample[name]) if sample.get(name) else "" for name in ("original", "compressed")]
        return [gr.update(visible=True), text, *texts, views.card(self.service.card(job.id, caller.user) or "")]

    def _empty(self, text: str) -> list[Any]:
        hidden = gr.update(visible=False)
        return [dict(NOTHING), gr.update(active=False), hidden, text, "", NO_PLOT, "", *[hidden] * 5, hidden,
                "", "", "", "", hidden, hidden, "", NO_PLOT]  # fmt: skip

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
            self.refresh(parts[name].click(act, parts["chosen"], parts["said"], **quiet))
        parts["again"].click(self._again, parts["chosen"], [form.model, tabs, parts["said"]], **quiet)

    def _actions(self) -> dict[str, Callable[..., str]]:
        def acting(act: Callable[[str, Caller], Any]) -> Callable[..., str]:
            def run(job: str, http: gr.Request) -> str:
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
        for name, label in (("cancel", "Cancel"), ("resume", "Go on where it stopped"), ("retry", "Begin anew"),
                            ("again", "Another recipe"), ("delete", "Forget this job")):  # fmt: skip
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
    parts["errors"] = gr.ScatterPlot(pd.DataFrame([], columns=LAYER), x="layer", y="error", height=240, visible=False,
                                     title="Relative output error of each layer", tooltip=["name", "error"],
                                     elem_id="errors")  # fmt: skip
    with gr.Accordion("Log", open=False, visible=False) as parts["details"]:
        parts["log"] = gr.Textbox(
            lines=12, max_lines=12, interactive=False, label="Log", elem_id="log", autoscroll=True
        )
    with gr.Column(visible=False) as parts["all"]:
        gr.Markdown("### All your jobs")
        parts["history"] = gr.Markdown(elem_id="history", elem_classes="plain")
        parts["compared"] = gr.ScatterPlot(pd.DataFrame([], columns=COMPARED), x="megabytes", y="perplexity ratio",
                                           color="recipe", height=260, title="Size and perplexity of all results",
                                           visible=False, tooltip="all", elem_id="compared")  # fmt: skip
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


def _label(job: Job) -> str:
    return f"{job.request['model']} · {views.recipe(job)} · {job.state}"


def _compared(found: Sequence[Job], reports: Mapping[str, Mapping[str, Any] | None]) -> Any:
    """Size against loss of all that was measured."""
    rows = []
    for job in found:
        evaluation, output = ((reports.get(job.id) or {}).get(name) or {} for name in ("evaluation", "output"))
        before, after, size = evaluation.get("reference_perplexity"), evaluation.get("perplexity"), output.get("bytes")
        if before and after and size:
            rows.append([size / 1e6, after / before, views.recipe(job)])
    return _plot(pd.DataFrame(rows, columns=COMPARED), least=2)


def _plot(points: pd.DataFrame, least: int = 1) -> Any:
    """Shown from so many points on."""
    return gr.update(value=points, visible=True) if len(points) >= least else NO_PLOT
