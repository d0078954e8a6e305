"""The page by keyboard alone, on one's own machine, and how soon it is there."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from space_app.app import create
from space_app.login import Login
from tests.conversion.jobs.conftest import Desk
from tests.serving import serving
from tests.space.conftest import Site
from tests.space.pages import CHROMIUM, SLOW, Page
from tests.space.test_browser import browser, expect, pytestmark

__all__ = ["browser", "pytestmark"]

FOCUSED = """() => { const e = document.activeElement, s = getComputedStyle(e), box = e.getBoundingClientRect();
    return {id: e.closest('[id]')?.id ?? '', ids: [...parents(e)], value: e.value ?? '', text: e.textContent.trim(),
            name: e.labels?.[0]?.textContent.trim() || e.ariaLabel || e.textContent.trim(),
            seen: box.width > 0 && box.height > 0, role: e.getAttribute('role') ?? e.tagName.toLowerCase()};
    function* parents(e) { for (; e; e = e.parentElement) if (e.id) yield e.id; } }"""


def tab_to(page: Page, wanted: str, *, steps: int = 60) -> dict[str, Any]:
    """Presses Tab until something in the element with that id has the focus; all on the way is seen and named."""
    for _ in range(steps):
        page.keyboard.press("Tab")
        found = page.evaluate(FOCUSED)
        if "tabs" in found["ids"]:
            assert found["seen"], found
            assert found["name"], found
        if wanted in found["ids"]:
            return found
    raise AssertionError(f"{wanted} is not reached by the Tab key")


def test_by_keyboard_alone(browser: Any, site: Site) -> None:
    page = Page(browser, site.url, 1280)
    page.tells("#status", "Not logged in")
    tab_to(page, "login")
    with page.leaving():
        page.keyboard.press("Enter")
        page.tells("#status", "alice")
    tab_to(page, "model")
    page.keyboard.type("alice/model")
    page.keyboard.press("Enter")
    page.tells("#facts", "LlamaForCausalLM")
    tab_to(page, "goal")
    for _ in range(3):  # gradio's choices are stops of their own
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.tells("#preview", "alice/model-rtn-w4g64")
    tab_to(page, "review")
    page.keyboard.press("Space")
    expect(page.locator("#start")).to_be_enabled(timeout=SLOW)
    tab_to(page, "start")
    page.keyboard.press("Enter")
    page.tells("#headline", "waiting for its turn")
    tab_to(page, "cancel")
    page.keyboard.press("Enter")
    page.tells("#headline", "cancelled")
    (job,) = site.desk.service.jobs("alice")
    assert (job.state, job.request["review"]) == ("cancelled", True)
    assert page.wrong == []


def test_a_key_moves_between_the_tabs(browser: Any, site: Site) -> None:
    page = Page(browser, site.url, 390)
    page.tells("#status", "Not logged in")
    page.get_by_role("tab", name="Convert").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.tells("#headline", "Log in to see your jobs")
    page.shows("#headline")


@pytest.fixture
def own(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page as `hfquant space` serves it on one's own machine."""
    for name in ("SYSTEM", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    with serving(create(desk.service, Login({}))) as url:
        yield url


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_on_ones_own_machine_nothing_is_fetched_from_elsewhere(browser: Any, own: str) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(own)
    page.locator("#status").get_by_text("For you").wait_for(timeout=SLOW)
    for tab in ("Jobs", "Examples", "Convert"):
        page.get_by_role("tab", name=tab).click()
    page.wait_for_timeout(1000)
    assert len(asked) > 10
    hosts = {urlsplit(url).hostname for url in asked if urlsplit(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}


@pytest.mark.slow  # by the clock: a machine with other work may miss it
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_it_is_painted_within_three_seconds(browser: Any, own: str) -> None:
    """In browsers that have never been here; the best of three, for other tests run beside this one."""
    painted = []
    for _ in range(3):
        page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
        page.goto(own)
        page.locator("#status").get_by_text("For you").wait_for(timeout=SLOW)
        painted.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"))
        page.context.close()
    assert min(painted) < 3.0, painted
