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


def test_another_gradio_loses_the_patch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calm, "_attach", None)
    monkeypatch.delattr(BlocksConfig, "attach_load_events")
    calm.apply()
    assert not hasattr(BlocksConfig, "attach_load_events")


def test_what_gradio_says_besides_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    monkeypatch.setattr(calm, "_attach", lambda page, *given, **named: heard.append((given, named)))
    config = BlocksConfig(gr.Blocks())
    part = gr.Textbox(render=False)
    part.load_event_to_attach, part.rendered_in = (lambda: "", None, None), "form"  # type: ignore[assignment]
    config.blocks = {0: part}
    calm._calmly(config, rendered_in="form", later=1)
    calm._calmly(config, "form")
    calm._calmly(config, "another")
    assert heard == [((), {"rendered_in": "form", "later": 1}), (("form",), {})]


def test_gradio_trips_and_the_page_does_not() -> None:
    assert calm._attach is not None
    with pytest.raises(RuntimeError, match="changed size during iteration"):
        calm._attach(restless(), "form")
    calm._calmly(restless(), "form")


def test_values_that_have_to_be_asked_for_still_are() -> None:
    calm.apply()
    with gr.Blocks() as page:
        gr.Textbox(lambda: "asked for")
    assert [fn.fn() for fn in page.default_config.fns.values() if fn.fn] == ["asked for"]
