"""The whole way in a real browser: log in, search, pick, look, start, reload, cancel, go on, open what was pushed."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.space.conftest import Site

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SAMPLES = "600"  # so many that there is time to look, to leave and to come back
SLOW = 120_000  # ms
SHOTS = os.environ.get("HFQUANT_SCREENSHOTS")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")


@pytest.fixture
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


def open_page(browser: Any, url: str, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """A page and what it complains of; pictures of people, which the test's Hub has not, do not count."""
    page = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme).new_page()
    page.set_default_timeout(SLOW)
    # a page of a Space asks the Hub whether the Space runs
    page.route(
        "https://huggingface.co/api/spaces/**",
        lambda route: route.fulfill(
            json={"id": "acme/space", "runtime": {"stage": "RUNNING"}}, headers={"Access-Control-Allow-Origin": "*"}
        ),
    )
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))

    def heard(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    page.on("console", heard)
    page.goto(url)
    return page, wrong


def shot(page: Any, name: str) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


def expect(locator: Any) -> Any:
    return playwright.expect(locator)


def test_from_the_login_to_the_pushed_model(site: Site, browser: Any) -> None:
    page, wrong = open_page(browser, site.url, 1280)
    expect(page.locator("#status")).to_contain_text("Not logged in", timeout=SLOW)
    page.locator("#login").click()
    expect(page.locator("#status")).to_contain_text("alice", timeout=SLOW)

    model = page.get_by_label("Model", exact=True)
    model.press_sequentially("mod", delay=60)
    page.locator("#suggestions").get_by_text("alice/model").click()
    expect(page.locator("#facts")).to_contain_text("LlamaForCausalLM", timeout=SLOW)
    expect(page.locator("#preview")).to_contain_text("are longer than the model's 256", timeout=SLOW)
    expect(page.locator("#start")).to_be_disabled()

    page.get_by_text("Options of the recipe").click()
    expect(page.get_by_label("samples")).to_have_value("64", timeout=SLOW)
    for label, value in (("seq len", "256"), ("max ppl ratio", ""), ("samples", SAMPLES)):
        page.get_by_label(label).fill(value)
        page.get_by_label(label).press("Tab")
    expect(page.locator("#preview")).to_contain_text("bits per weight", timeout=SLOW)
    expect(page.locator("#preview")).to_contain_text("alice/model-gptq-w4g64")
    page.get_by_text("Options of the recipe").click()
    shot(page, "convert-1280")
    expect(page.locator("#start")).to_be_enabled(timeout=SLOW)
    page.locator("#start").click()

    expect(page.locator("#steps")).to_contain_text("Compress", timeout=SLOW)
    expect(page.locator("#headline")).to_contain_text("waiting", timeout=SLOW)
    site.desk.work()
    expect(page.locator("#steps progress")).to_be_visible(timeout=SLOW)
    page.close()
    page, more = open_page(browser, site.url, 1280)  # another day, another browser: nothing is remembered there
    page.locator("#login").click()
    expect(page.locator("#status")).to_contain_text("alice", timeout=SLOW)
    page.get_by_role("tab", name="Jobs").click()
    expect(page.locator("#steps progress")).to_be_visible(timeout=SLOW)
    expect(page.locator("#errors")).to_be_visible(timeout=SLOW)
    shot(page, "running-1280")
    page.reload()
    page.get_by_role("tab", name="Jobs").click()
    expect(page.locator("#steps progress")).to_be_visible(timeout=SLOW)

    page.locator("#cancel").click()
    expect(page.locator("#headline")).to_contain_text("cancelled", timeout=SLOW)
    page.locator("#resume").click()
    expect(page.locator("#headline")).to_contain_text("done", timeout=SLOW)
    expect(page.locator("#comparison")).to_contain_text("perplexity", timeout=SLOW)
    expect(page.locator("#headline").get_by_role("link")).to_have_attribute(
        "href", re.compile("alice/model-gptq-w4g64")
    )
    page.wait_for_timeout(2500)
    shot(page, "done-1280")
    assert "model.safetensors" in site.desk.arrived("alice/model-gptq-w4g64")
    (job,) = site.desk.service.jobs("alice")
    assert job.request["recipe"]["calibration"]["samples"] == int(SAMPLES)
    assert job.request["recipe"]["gate"]["max_ppl_ratio"] is None
    assert wrong + more == []


def test_on_a_phone_by_keyboard_and_for_those_who_hear_it(site: Site, browser: Any) -> None:
    page, wrong = open_page(browser, site.url, 390, "dark")
    expect(page.locator("#status")).to_contain_text("Not logged in", timeout=SLOW)
    model = page.get_by_label("Model", exact=True)
    model.focus()
    page.keyboard.type("alice/model")
    page.keyboard.press("Enter")
    expect(page.locator("#preview")).to_contain_text("Log in to start it", timeout=SLOW)
    expect(page.locator("#start")).to_be_disabled()
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, f"the page is {wide} pixels wide"
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input:not([type=hidden]), select, textarea, button')]
            .filter(e => e.offsetParent && !(e.labels?.length || e.ariaLabel || e.title || e.textContent.trim()
                     || e.getAttribute('aria-labelledby')))
            .map(e => e.outerHTML.slice(0, 160))"""
    )
    assert nameless == []
    shot(page, "convert-390")
    for tab in ("Jobs", "Examples"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(800)
        shot(page, f"{tab.lower()}-390")
    assert wrong == []
