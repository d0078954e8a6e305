"""What a process says on stderr."""

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from hfquant.conversion.redact import log_to_stderr


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("hfquant")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    for handler in handlers:  # pytest's own: `force` would close them
        root.removeHandler(handler)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def test_a_stderr_that_is_closed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in one process, each with a stderr of its own."""
    first, second = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    monkeypatch.setattr(sys, "stderr", first)
    log_to_stderr()
    logging.warning("one")
    first.flush()
    assert b"WARNING one" in first.buffer.getvalue()  # type: ignore[attr-defined]
    first.close()
    monkeypatch.setattr(sys, "stderr", second)
    for handler in logging.getLogger().handlers:
        handler.flush()  # as whoever ends does
    log_to_stderr()
    logging.warning("two hf_" + "a" * 20)
    assert "two hf_…" in second.getvalue()
    assert "aaaa" not in second.getvalue()
