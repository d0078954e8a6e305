"""What many people's pages ask every second: little, and everything only when the job turned."""

from typing import Any

import httpx
import pytest

from space_app import jobs
from tests.space.conftest import Site


@pytest.fixture
def config(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{site.url}/config").json()
    return found


def events(config: dict[str, Any], what: str) -> list[dict[str, Any]]:
    return [event for event in config["dependencies"] if any(target[1] == what for target in event["targets"])]


def test_a_tick_fills_few_parts_and_none_of_the_buttons(config: dict[str, Any]) -> None:
    (tick,) = events(config, "tick")
    assert len(tick["outputs"]) == len(jobs.TICKING) < len(jobs.FILLED) / 2
    kinds = {part["id"]: part["type"] for part in config["components"]}
    assert "button" not in {kinds[part] for part in tick["outputs"]}


def test_all_is_shown_anew_when_what_a_tick_tells_changes(config: dict[str, Any]) -> None:
    """`turned` has to be a part of the page: of a state that changes without the queue no page is told."""
    (turned,) = [part for part in config["components"] if part["props"].get("elem_id") == "turned"]
    assert turned["type"] != "state"
    assert turned["props"]["visible"] == "hidden", "in the page, or it would not be told either"
    (tick,) = events(config, "tick")
    assert turned["id"] in tick["outputs"]
    (show,) = [event for event in events(config, "change") if event["targets"][0][0] == turned["id"]]
    assert len(show["outputs"]) == len(jobs.FILLED)
    assert not show["queue"]
