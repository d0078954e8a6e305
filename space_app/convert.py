"""The first tab: a model, a recipe, a place for the result, and what it will cost."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr
from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from hfquant.conversion.service import Service
from hfquant.errors import HfquantError
from hfquant.recipe import Recipe
from space_app import catalogue, options, views
from space_app.login import Login

SUGGESTED = 8
EXECUTORS = {"on this machine": "local", "on Hugging Face Jobs, billed to you": "hf-jobs"}
CHOOSE = "Choose a model first."
VISIBILITY = {"as the original": None, "public": False, "private": True}


@dataclass
class Form:
    """What of the tab others need."""

    model: gr.Textbox
    suggestions: gr.Dataset
    facts: gr.Markdown
    goal: gr.Radio
    recipe: gr.Dropdown
    described: gr.Markdown
    values: gr.JSON
    owner: gr.Dropdown
    name: gr.Textbox
    visibility: gr.Radio
    pull_request: gr.Checkbox
    review: gr.Checkbox
    terms: gr.Checkbox
    executor: gr.Radio
    hardware: gr.Dropdown
    max_usd: gr.Number
    preview: gr.Markdown
    start: gr.Button

    @property
    def asked(self) -> list[Any]:
        """What makes a request, in the order in which `request` takes it."""
        return [self.model, self.recipe, self.values, self.owner, self.name, self.visibility, self.pull_request,
                self.review, self.terms, self.executor, self.hardware, self.max_usd]  # fmt: skip


def build(service: Service, login: Login) -> Form:
    """The tab's content."""
    # with the reader, not the server: what was typed a moment before Start is pressed is in it
    values = gr.JSON({}, visible="hidden", elem_id="values")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            gr.Markdown("### 1. Model")
            model = gr.Textbox(label="Model", placeholder="namespace/name on the Hub", max_lines=1, elem_id="model")
            suggestions = gr.Dataset(components=["textbox"], samples=[], label="On the Hub", elem_id="suggestions",
                                     samples_per_page=SUGGESTED, visible=False)  # fmt: skip
            facts = gr.Markdown(elem_id="facts", elem_classes="tiles")
            gr.Markdown("### 2. Recipe")
            goal = gr.Radio([*catalogue.GOALS, *catalogue.AMOUNTS, catalogue.BY_NAME], value="balanced",
                            label="What matters most", elem_id="goal")  # fmt: skip
            first = catalogue.GOALS["balanced"]
            recipe = gr.Dropdown(catalogue.names(), value=first, label="Recipe", elem_id="recipe",
                                 info="or any combination, such as gptq-w5g32; or a goal: fit 2.5 GB, lose 1%",
                                 allow_custom_value=True)  # fmt: skip
            described = gr.Markdown(catalogue.describe(first), elem_id="described")
            with gr.Accordion("Options of the recipe", open=False, elem_id="options"):
                _options_form(recipe, values)
            gr.Markdown("### 3. Result")
            with gr.Row():
                owner = gr.Dropdown([], label="Owner", elem_id="owner", info="you, or an organization of yours")
                name = gr.Textbox(label="Name", elem_id="name", max_lines=1, info="empty: the one that is shown")
            visibility = gr.Radio(list(VISIBILITY), value="as the original", label="Who sees a new repository",
                                  elem_id="visibility")  # fmt: skip
            with gr.Row():
                pull_request = gr.Checkbox(label="as a pull request", elem_id="pull-request")
                review = gr.Checkbox(label="let me look before it is pushed", elem_id="review")
            terms = gr.Checkbox(label="I have read the original's licence and keep its terms", elem_id="terms",
                                visible=False)  # fmt: skip
            executor = gr.Radio(list(EXECUTORS), value=next(iter(EXECUTORS)), label="Where it runs", elem_id="executor",
                                visible=login.rents)  # fmt: skip
            hardware = gr.Dropdown([], label="Hardware", visible=False, elem_id="hardware")
            max_usd = gr.Number(label="At most, in US dollars", value=None, minimum=0, visible=False, elem_id="max-usd",
                                info="empty: as much as this service allows")  # fmt: skip
        with gr.Column(scale=2, min_width=320, elem_id="summary"):
            gr.Markdown("### 4. What it will cost and give")
            preview = gr.Markdown(CHOOSE, elem_id="preview", elem_classes="tiles", min_height=60)
            start = gr.Button("Start", variant="primary", interactive=False, elem_id="start")
    return Form(model, suggestions, facts, goal, recipe, described, values, owner, name, visibility, pull_request,
                review, terms, executor, hardware, max_usd, preview, start)  # fmt: skip


def _options_form(recipe: gr.Dropdown, values: gr.JSON) -> None:
    """One field for each option of the recipe that is chosen; `values` collects them."""

    # one at a time: two of gradio's forms that are built at once trip over each other
    @gr.render(inputs=recipe, show_progress="hidden", concurrency_limit=1)  # type: ignore[untyped-decorator]
    def form(name: str) -> None:
        try:
            groups = options.fields(Recipe.parse(catalogue.asked(name)))
        except HfquantError as error:
            gr.Markdown(views.failure(error))
            return
        widgets: dict[str, Any] = {}
        for title, group in groups.items():
            gr.Markdown(f"**{title}**")
            for row in ([f for f in group if f.kind != "bool"], [f for f in group if f.kind == "bool"]):
                with gr.Row():
                    widgets |= {field.key: _widget(field) for field in row}
        # all of them each time: of two that are changed quickly, neither is lost
        gr.on([widget.change for widget in widgets.values()], None, list(widgets.values()), values,
              js=_collected(list(widgets)), api_visibility="private")  # fmt: skip


def _widget(field: options.Field) -> Any:
    common: dict[str, Any] = {
        "label": field.label,
        "info": field.info,
        "elem_id": f"option-{field.key.replace('.', '-')}",
        "min_width": 220,
        "interactive": True,  # what is rendered later is else taken for an output
    }
    if field.kind == "bool":
        return gr.Checkbox(value=field.value, **common)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=field.value, **common)
    if field.kind == "number":
        return gr.Number(value=field.value, **common)
    return gr.Textbox(value="" if field.value is None else str(field.value), max_lines=1, **common)


def _collected(keys: list[str]) -> str:
    """A script's function from the fields' values to an object: without a way to the server and back."""
    return f"(...given) => Object.fromEntries({json.dumps(keys)}.map((key, i) => [key, given[i]]))"


def request(
    model: str, recipe: str, values: dict[str, Any], owner: str | None, name: str, visibility: str,
    pull_request: bool, review: bool, terms: bool, executor: str, hardware: str | None, max_usd: float | None,
) -> dict[str, Any]:  # fmt: skip
    """The form as a request.  Raises RecipeError for a recipe that does not exist."""
    model = model.strip()
    rented = EXECUTORS[executor] != "local"
    target = f"{owner}/{name.strip() or default_name(model, recipe)}" if owner else None
    return {
        "model": model,
        **recipe_of(recipe, values),
        "target": target,
        "private": VISIBILITY[visibility],
        "pull_request": pull_request and target is not None,
        "review": review and target is not None,
        "accept_terms": terms,
        "executor": EXECUTORS[executor],
        "hardware": hardware if rented else None,
        "max_usd": (max_usd or None) if rented else None,  # an empty field is 0 to the page
    }


def recipe_of(recipe: str, values: dict[str, Any]) -> dict[str, Any]:
    """The part of a request that is about its recipe.  Raises RecipeError for one that does not exist."""
    chosen = catalogue.asked(recipe)
    return {"recipe": chosen, "changes": options.changes(Recipe.parse(chosen), values)}


def default_name(model: str, recipe: str) -> str:
    """`SmolLM2-135M-gptq-w4g64`, `SmolLM2-135M-fit-2.5GB`"""
    words = re.sub(r"(?<=\d)\s+(?=\w)", "", recipe.strip())  # 2.5 GB is one word
    words = re.sub(r"[^\w.-]+", "-", re.sub(r"\s*%", "-percent", words))
    return f"{model.rpartition('/')[2]}-{words}"[:96]


def owners(login: Login, http: gr.Request) -> Any:
    """The namespaces that the caller may choose from."""
    caller = login.caller(http)
    names = caller.namespaces if caller else []
    return gr.update(choices=names, value=names[0] if names else None, visible=bool(names))


def connect(
    form: Form, service: Service, login: Login, job: gr.BrowserState, tabs: gr.Tabs, refresh: Callable[..., Any]
) -> None:
    """What happens when something is typed, chosen or pressed."""

    def token(http: gr.Request) -> str | None:
        caller = login.caller(http)
        return None if caller is None else caller.token

    def search(text: str, http: gr.Request) -> Any:
        if len(text.strip()) < 2:
            return gr.update(visible=False)
        try:
            models = list(HfApi(token=token(http)).list_models(search=text.strip(), limit=SUGGESTED))
        except (HfHubHTTPError, HTTPError):
            return gr.update(
                visible=False
            )  # the name can be typed; what is wrong with the Hub shows when it is looked at
        found = [[model.id] for model in models if model.id != text.strip()]
        return gr.update(samples=found, visible=bool(found))

    def look(model: str, http: gr.Request) -> str:
        if not model.strip():
            return ""
        try:
            return views.facts(service.inspect(model.strip(), token=token(http)))
        except HfquantError as error:
            return views.failure(error)

    def cost(*asked: Any) -> tuple[str, Any, Any, Any]:
        """The preview; whether it may start; whether terms have to be agreed to; the name if none is given."""
        *given, http = asked
        model, recipe, terms = str(given[0]).strip(), given[1], given[8]
        shown = gr.update(placeholder=default_name(model, recipe) if model else "")
        off = gr.update(interactive=False)
        if not model:
            return CHOOSE, off, gr.skip(), shown
        try:
            caller = login.caller(http)
            found = service.preview(
                request(*given), user=caller.user if caller else None, token=caller.token if caller else None
            )
        except HfquantError as error:
            return views.failure(error), off, gr.skip(), shown
        text = views.preview(found)
        if caller is None:
            text += "\n\n**Log in to start it.**"
        agree = gr.update(visible=terms or any(p.kind == "license" and p.blocks for p in found.problems))
        return text, gr.update(interactive=found.allowed and caller is not None), agree, shown

    def start(*asked: Any) -> tuple[Any, Any, str]:
        *given, http = asked
        try:
            caller = login.required(http)
            done = service.submit(request(*given), caller.user, caller.token, expires=caller.expires)
        except HfquantError as error:
            return gr.skip(), gr.skip(), views.failure(error)
        note = "" if done.created else "An equal request is there already: this is its job."
        return done.id, gr.update(selected="jobs"), note

    def rented(chosen: str, http: gr.Request) -> tuple[Any, Any]:
        if EXECUTORS[chosen] == "local":
            return gr.update(visible=False), gr.update(visible=False)
        offers = [
            (f"{h.label}, {h.memory}, ${h.usd_per_hour:.2f} per hour", h.name) for h in service.hardware(token(http))
        ]
        return gr.update(choices=offers, value=offers[0][1] if offers else None, visible=True), gr.update(visible=True)

    def asked_with(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: Any, recipe: Any, values: Any, owner: Any, name: Any, visibility: Any, pull_request: Any,
                 review: Any, terms: Any, executor: Any, hardware: Any, max_usd: Any,
                 http: gr.Request) -> Any:  # fmt: skip
            return function(model, recipe, values, owner, name, visibility, pull_request, review, terms, executor,
                            hardware, max_usd, http)  # fmt: skip

        return call

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    form.model.input(search, form.model, form.suggestions, trigger_mode="always_last", queue=False, **quiet)
    form.suggestions.click(lambda sample: (sample[0], gr.update(visible=False)), form.suggestions,
                           [form.model, form.suggestions], queue=False, **quiet)  # fmt: skip
    form.goal.change(
        lambda goal: (catalogue.GOALS | catalogue.AMOUNTS).get(goal, gr.skip()),
        form.goal,
        form.recipe,
        queue=False,
        **quiet,
    )
    form.recipe.change(None, None, form.values, js="() => ({})", api_visibility="private")
    form.recipe.change(catalogue.describe, form.recipe, form.described, queue=False, **quiet)
    form.executor.change(rented, form.executor, [form.hardware, form.max_usd], **quiet)
    gr.on([form.model.submit, form.model.blur, form.suggestions.click], look, form.model, form.facts,
          trigger_mode="always_last", **quiet)  # fmt: skip
    changed = [form.model.submit, form.model.blur, form.suggestions.click, form.recipe.change, form.values.change,
               form.owner.change, form.name.blur, form.visibility.change, form.pull_request.change, form.terms.change,
               form.executor.change, form.hardware.change, form.max_usd.blur]  # fmt: skip
    gr.on(changed, asked_with(cost), form.asked, [form.preview, form.start, form.terms, form.name],
          trigger_mode="always_last", api_visibility="private", show_progress="minimal",
          show_progress_on=form.preview)  # fmt: skip
    pressed = form.start.click(asked_with(start), form.asked, [job, tabs, form.preview], api_visibility="private")
    refresh(pressed)
