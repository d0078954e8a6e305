"""The third tab: cards of real conversions, for those who want to see one before they log in."""

from pathlib import Path

import gradio as gr

from hfquant.measure.card import TEMPLATES


def build() -> None:
    """The cards that come with hfquant."""
    cards = sorted((Path(TEMPLATES) / "examples").glob("*/README.md"))
    if not cards:
        gr.Markdown("This installation came without examples.")
    for card in cards:
        with gr.Accordion(card.parent.name, open=card == cards[0]):
            gr.Markdown(_body(card.read_text("utf-8")))


def _body(text: str) -> str:
    """Without the block of metadata, and without figures, whose files are elsewhere."""
    body = text.split("\n---\n", 1)[1] if text.startswith("---\n") else text
    return "\n".join(line for line in body.splitlines() if not line.startswith("!["))
