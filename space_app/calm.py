"""A mistake of gradio 6.31, kept away from the form of a recipe's options.

When that form has been built, gradio goes through all that is on this person's page to find values that have to be
asked for.  Meanwhile another of their events may change the page: "dictionary changed size during iteration", and the
word *Error* stands where the form should.  Nothing in the form has such a value.
"""

from collections.abc import Callable
from typing import Any

from gradio.blocks import BlocksConfig

# private, so a version of gradio may do without it: then there is nothing to keep away
_attach: Callable[..., Any] | None = getattr(BlocksConfig, "attach_load_events", None)


def _calmly(self: BlocksConfig, *given: Any, **named: Any) -> None:
    """As gradio's own, but for a page without such values, of which a copy is looked through."""
    assert _attach is not None
    rendered_in = given[0] if given else named.get("rendered_in")
    parts = [part for part in list(self.blocks.values()) if rendered_in is None or part.rendered_in == rendered_in]
    if any(getattr(part, "load_event_to_attach", None) for part in parts):
        _attach(self, *given, **named)


def apply() -> None:
    """Once or more often, before a page is built."""
    if _attach is None:
        return
    BlocksConfig.attach_load_events = _calmly  # type: ignore[method-assign]
