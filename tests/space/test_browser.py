"""The whole way in a real browser: log in, search, pick, look, start, reload, cancel, go on, open what was pushed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest

from tests.conversion.jobs.forks import Forked
from tests.space.conftest import Site
from tests.space.pages import CHROMIUM, QUIET, SLOW, Page

SAMPLES = "600"  # so many that there is time to look, to leave and to come back

WIDTHS = [(1280, "light"), (390, "dark")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")


@pytest.fixture
def browser() -> Iterator[Any]:
    """Asked for before `site`, so that it ends after it: a worker is a fork that holds the browser's pipes open."""
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        found.close()


def expect(locator: Any) -> Any:
    return playwright.expect(locator)


def choose(page: Page) -> None:
    """From the first letters of a model to a preview that may be started."""
    page.get_by_label("Model", exact=True).press_sequentially("mod", delay=60)
    page.shows("#suggestions")
    page.look("2-search")
    page.locator("#suggestions").get_by_text("alice/model").click()
    page.tells("#facts", "LlamaForCausalLM")
    page.tells("#preview", "are longer than the model's 256")
    expect(page.locator("#start")).to_be_disabled()
    page.look("3-picked")

    page.get_by_text("Options of the recipe").click()
    expect(page.get_by_label("samples")).to_have_value("64", timeout=SLOW)
    for label, value in (("seq len", "256"), ("max ppl ratio", ""), ("samples", SAMPLES)):
        page.get_by_label(label).fill(value)
        page.get_by_label(label).press("Tab")
    page.tells("#preview", "bits per weight")
    page.tells("#preview", "alice/model-gptq-w4g64")
    page.look("4-options")
    page.get_by_text("Options of the recipe").click()
    expect(page.locator("#start")).to_be_enabled(timeout=SLOW)
    page.look("5-preview")


@contextmanager
def held(worker: Forked) -> Iterator[None]:
    """Its job stands still meanwhile: a quick machine would be done before somebody has come back."""
    jobs = psutil.Process(worker.pid).children(recursive=True)
    assert jobs
    for job in jobs:
        job.suspend()
    yield
    for job in jobs:
        with suppress(psutil.NoSuchProcess):
            job.resume()


def watch(page: Page) -> None:
    page.open("Jobs")
    page.shows("#steps progress")


@pytest.mark.parametrize(("width", "scheme"), WIDTHS, ids=["desk", "phone"])
def test_from_the_login_to_the_pushed_model(browser: Any, site: Site, width: int, scheme: str) -> None:
    page = Page(browser, site.url, width, scheme)
    page.tells("#status", "Not logged in")
    page.look("1-arrived")
    page.log_in()
    choose(page)
    page.locator("#start").click()
    page.tells("#steps", "Compress")
    page.tells("#headline", "waiting")
    page.look("6-waiting")
    worker = site.desk.work()
    page.shows("#steps progress")
    with held(worker):
        first, page = (
            page,
            Page(browser, site.url, width, scheme),
        )  # another day, another browser: nothing is remembered
        first.close()
        page.log_in()
        watch(page)
        page.shows("#errors svg.marks")
        expect(page.locator("#compared")).to_be_hidden()  # there is no result yet
        page.look("7-running")
        page.come_back()
        watch(page)
        page.locator("#cancel").click()
    page.tells("#headline", "cancelled")
    page.tells("#steps .stopped", "Compress")
    page.look("8-cancelled")
    page.locator("#resume").click()
    page.shows("#cancel")
    page.look("9-resumed")
    page.tells("#headline", "done")
    page.tells("#comparison", "perplexity")
    link = page.locator("#headline").get_by_role("link")
    expect(link).to_have_attribute("href", re.compile("alice/model-gptq-w4g64"))
    page.shows("#errors svg.marks")
    expect(page.locator("#compared")).to_be_hidden()  # one result alone
    page.look("10-done")
    page.get_by_role("button", name="The card").click()
    page.tells("#card", "Metadata")
    page.look("11-card")
    again(page)

    assert "model.safetensors" in site.desk.arrived("alice/model-gptq-w4g64")
    kept = {job.request["recipe"]["name"].partition(" with ")[0]: job for job in site.desk.service.jobs("alice")}
    assert set(kept) == {"gptq-w4g64", "rtn-w4g64"}
    assert kept["gptq-w4g64"].request["recipe"]["calibration"]["samples"] == int(SAMPLES)
    assert kept["gptq-w4g64"].request["recipe"]["gate"]["max_ppl_ratio"] is None
    assert first.wrong + page.wrong == []


def again(page: Page) -> None:
    """Another recipe for the same model; both are then compared."""
    page.locator("#again").click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("alice/model", timeout=SLOW)
    page.get_by_label("quickest to make").check()
    page.tells("#preview", "alice/model-rtn-w4g64")
    expect(page.locator("#start")).to_be_enabled(timeout=SLOW)
    page.locator("#start").click()
    page.tells("#headline", "rtn-w4g64")
    page.tells("#headline", "done")
    page.tells("#history", "rtn-w4g64")
    page.shows("#compared svg.marks")
    page.look("12-history")
    page.open("Examples")
    page.shows("#examples")
    page.look("13-examples")
