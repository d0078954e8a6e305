"""On ZeroGPU: one block of the chosen model, rounded onto the recipe's grids on the GPU that is lent for it."""

from typing import Any

import gradio as gr

from hfquant.conversion.service import Service
from hfquant.conversion.slices import Rounded, rounded
from hfquant.errors import HfquantError, SourceError
from hfquant.measure.markdown import code, number
from space_app import convert, views, zero
from space_app.convert import Form
from space_app.login import Login

SAYS = """How far is each weight of the block in the middle from its place on the recipe's grid, rounded to nearest?
It takes seconds of your share of ZeroGPU. A calibrated method does better, by the inputs, which are not looked at here:
the conversion measures what the whole model lost."""


def build(form: Form, service: Service, login: Login) -> None:
    """A button below the form, and what it finds."""
    on_gpu = zero.lent(rounded)
    with gr.Accordion("First look: one block, on a GPU", open=False, elem_id="first-look"):
        gr.Markdown(SAYS)
        press = gr.Button("Round one block", elem_id="round")
        found = gr.Markdown(elem_id="rounded", elem_classes="plain")

    def look(model: Any, recipe: Any, values: Any, http: gr.Request) -> str:
        if not model.strip():
            return convert.CHOOSE
        try:
            caller = login.required(http)
            wish = {"model": model.strip(), **convert.recipe_of(recipe, values)}
            return table(on_gpu(service.block(wish, caller.token)))
        except HfquantError as error:
            return views.failure(error)
        except (RuntimeError, ValueError) as error:  # torch's words; gradio's own errors, of shares, are shown by it
            said = f"the block of {model.strip()} could not be rounded: {error}"
            return views.failure(SourceError(said, "start the conversion"))

    press.click(look, [form.model, form.recipe, form.values], found, api_visibility="private", concurrency_limit=1)


def table(found: list[Rounded]) -> str:
    """A line for each weight."""
    lines = ["| weight | shape | grid | error relative to the weight |", "|---|---:|---|---:|"]
    for one in found:
        shape = f"{one.shape[0]} × {one.shape[1]}"
        lines.append(f"| {code(one.name)} | {shape} | {code(one.grid)} | {number(one.error, '.2%')} |")
    return "\n".join(lines)
