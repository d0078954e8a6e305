"""A mistake of gradio 6.31, kept away from the form of a recipe's options.

When that form has been built, gradio goes through all that is on this person's page to find values that have to be
asked for.  Meanwhile another of their events may change the page: "dictionary changed size during iteration", and the
word *Error* stands where the form should.  Nothing in the form has such a value.
"""

from typing import Any

from gradio.blocks import BlocksConfig

_attach = BlocksConfig.attach_load_events


def _calmly(self: BlocksConfig, rendered_in: Any = None) -> None:
    """As gradio's own, but for a page without such values, of which a copy is looked through."""
    parts = [part for part in list(self.blocks.values()) if rendered_in is None or part.rendered_in == rendered_in]
    if any(getattr(part, "load_event_to_attach", None) for part in parts):
        _attach(self, rendered_in)


def apply() -> None:
    """Once or more often, before a page is built."""
    BlocksConfig.attach_load_events = _calmly  # type: ignore[method-assign]
