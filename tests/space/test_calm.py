"""A form that is built while the page changes is built all the same."""

from typing import Any

import gradio as gr
import pytest
from gradio.blocks import BlocksConfig

from space_app import calm


class Part:
    """A part of a page; to look at it is the moment in which another event adds one."""

    load_event_to_attach = None

    def __init__(self, page: dict[int, Any]) -> None:
        self.page = page

    @property
    def rendered_in(self) -> str:
        self.page[len(self.page)] = Part({})
        return "form"


def restless() -> BlocksConfig:
    config = BlocksConfig(gr.Blocks())
    config.blocks = {}
    config.blocks[0] = Part(config.blocks)  # type: ignore[assignment]
    config.blocks[1] = Part(config.blocks)  # type: ignore[assignment]
    return config


def test_gradio_trips_and_the_page_does_not() -> None:
    with pytest.raises(RuntimeError, match="changed size during iteration"):
        calm._attach(restless(), "form")  # type: ignore[arg-type]
    calm._calmly(restless(), "form")


def test_values_that_have_to_be_asked_for_still_are() -> None:
    calm.apply()
    with gr.Blocks() as page:
        gr.Textbox(lambda: "asked for")
    assert [fn.fn() for fn in page.default_config.fns.values() if fn.fn] == ["asked for"]
