"""The third tab: cards of real conversions, for those who want to see one before they log in."""

from pathlib import Path

import gradio as gr

from hfquant.measure.card import TEMPLATES
from space_app import views


def build() -> None:
    """The cards that come with hfquant."""
    folder = Path(TEMPLATES) / "examples"
    gr.set_static_paths([folder])
    cards = sorted(folder.glob("*/README.md"))
    if not cards:
        gr.Markdown("This installation came without examples.")
    for card in cards:
        with gr.Accordion(card.parent.name, open=card == cards[0]):
            figures = {f"figures/{file.name}": f"/gradio_api/file={file.as_posix()}"
                       for file in card.parent.glob("figures/*.png")}  # fmt: skip
            gr.Markdown(views.card(card.read_text("utf-8"), figures), elem_classes="card")
