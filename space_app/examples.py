"""The third tab: cards of real conversions, for those who want to see one before they log in."""

from pathlib import Path

import gradio as gr

from hfquant.measure.card import TEMPLATES
from space_app import views


def build() -> None:
    """The cards that come with hfquant."""
    cards = sorted((Path(TEMPLATES) / "examples").glob("*/README.md"))
    if not cards:
        gr.Markdown("This installation came without examples.")
    for card in cards:
        with gr.Accordion(card.parent.name, open=card == cards[0]):
            gr.Markdown(views.card(card.read_text("utf-8")), elem_classes="card")
