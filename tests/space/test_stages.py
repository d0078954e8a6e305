"""What a whole way in the browser does not pass by: a job that fails, its log, where its result goes, what it costs."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from hfquant.conversion.job import Job
from tests.conversion.jobs.conftest import Desk, wait
from tests.conversion.jobs.test_hf_jobs import Machines, machines, quick
from tests.space.conftest import SCOPES, Site, opened
from tests.space.pages import SLOW, Page
from tests.space.test_browser import WIDTHS, browser, expect, held, pytestmark

__all__ = ["browser", "machines", "pytestmark"]


def pick(page: Page, goal: str = "quickest to make", told: str = "alice/model-rtn-w4g64") -> None:
    """A model and a recipe, until the page says what of it."""
    page.get_by_label("Model", exact=True).fill("alice/model")
    page.keyboard.press("Enter")
    page.tells("#facts", "LlamaForCausalLM")
    page.get_by_label(goal).check()
    page.tells("#preview", told)


def start(page: Page) -> None:
    expect(page.locator("#start")).to_be_enabled(timeout=SLOW)
    page.locator("#start").click()
    page.shows("#headline")


def drawn(page: Page, place: str) -> int:
    """How many pictures a card shows; none of them is broken."""
    pictures = page.locator(f"{place} img:visible")
    expect(pictures.first).to_be_visible(timeout=SLOW)
    page.wait_for_function(f"[...document.querySelectorAll('{place} img')].every(i => i.complete)")
    assert all(picture.evaluate("i => i.naturalWidth > 100") for picture in pictures.all())
    return int(pictures.count())


def only(site: Site) -> Job:
    (job,) = site.desk.service.jobs("alice")
    return job


@pytest.mark.parametrize(("width", "scheme"), WIDTHS, ids=["desk", "phone"])
def test_a_broken_shard_is_told_in_words_and_begun_anew(browser: Any, site: Site, width: int, scheme: str) -> None:
    """The Hub delivers other bytes than it promises; when they are mended, the page's button is enough."""
    files = site.desk.hub.store.repos["alice/model"].resolve("main").files
    shard = site.desk.hub.store.folder / files["model.safetensors"].sha256
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-64] + bytes(64))
    page = Page(browser, site.url, width, scheme)
    page.log_in()
    pick(page)
    start(page)
    site.desk.work()
    page.tells("#headline", "failed")
    page.tells("#headline", "model.safetensors of alice/model arrived with another content")
    page.tells("#headline", "What helps: resume the job to try again")
    expect(page.locator("#steps .failed")).to_have_text(re.compile("Download"))
    page.look("20-failed")
    shard.write_bytes(whole)
    page.get_by_role("button", name="Begin anew").click()
    page.tells("#headline", "done")
    assert (only(site).state, only(site).attempt) == ("done", 2)
    assert "model.safetensors" in site.desk.arrived("alice/model-rtn-w4g64")
    assert page.wrong == []


def test_a_result_below_its_gate_says_by_how_much(browser: Any, site: Site) -> None:
    page = Page(browser, site.url, 390)
    page.log_in()
    pick(page)
    page.get_by_text("Options of the recipe").click()
    page.get_by_label("max kl").fill("0.000001")
    page.get_by_label("max kl").press("Tab")
    start(page)
    site.desk.work()
    page.tells("#headline", "the result is below its recipe's gate, nothing was pushed")
    page.tells("#headline", "KL divergence is")
    page.tells("#headline", "use more bits, smaller groups or a calibrated method")
    expect(page.locator("#steps .failed")).to_have_text(re.compile("Gate"))
    page.shows("#comparison")  # what was measured can be looked at
    page.look("21-below-the-gate")
    expect(page.locator("#retry")).to_be_enabled()
    assert "alice/model-rtn-w4g64" not in site.desk.hub.store.repos
    assert page.wrong == []


def test_log_and_time_left_while_it_runs(browser: Any, site: Site) -> None:
    page = Page(browser, site.url, 1280)
    page.log_in()
    pick(page, "balanced", "are longer than the model's 256")
    page.get_by_text("Options of the recipe").click()
    for label, value in (("seq len", "256"), ("max ppl ratio", ""), ("samples", "400")):
        page.get_by_label(label).fill(value)
        page.get_by_label(label).press("Tab")
    start(page)
    worker = site.desk.work()
    wait(lambda: only(site).progress.eta is not None)  # after its first layer
    with held(worker):
        expect(page.locator("#headline")).to_have_text(re.compile(r"about [\d.]+ \w+( \d+ \w+)? left"), timeout=SLOW)
        page.shows("#steps progress")
        page.tells("#history", "running")
        page.locator("button.label-wrap", has_text="Log").click()
        box = page.get_by_label("Log", exact=True)
        expect(box).to_have_value(re.compile("fetching model.safetensors"), timeout=SLOW)
        expect(box).not_to_have_value(re.compile("push: running"))
        page.look("22-log")
    page.tells("#headline", "done")
    expect(box).to_have_value(re.compile("push: running\n(.*\n)*push: done"), timeout=SLOW)
    assert page.wrong == []


def choose(page: Page, label: str, option: str | re.Pattern[str]) -> None:
    page.get_by_label(label).click()
    page.get_by_role("option", name=option).click()


@pytest.fixture
def shared(desk: Desk) -> Desk:
    """Alice belongs to an organization."""
    desk.hub.oauth.organizations = ("acme",)
    desk.hub.store.orgs["acme"] = {"alice"}
    return desk


def test_the_result_goes_where_the_form_says(browser: Any, shared: Desk, site: Site) -> None:
    """An organization's private repository; then, with another recipe, a pull request to it."""
    store = site.desk.hub.store
    page = Page(browser, site.url, 1280)
    page.log_in()
    pick(page)
    page.tells("#preview", "(new, public)")
    choose(page, "Owner", "acme")
    name = page.locator("#name").get_by_role("textbox")
    name.fill("small")
    name.press("Tab")
    page.get_by_label("private").check()
    page.tells("#preview", "acme/small (new, private)")
    page.get_by_label("as a pull request").check()
    page.tells("#preview", "acme/small does not exist yet")
    expect(page.locator("#start")).to_be_disabled()
    page.get_by_label("as a pull request").uncheck()
    start(page)
    site.desk.work()
    page.tells("#headline", "Pushed: acme/small")
    assert store.repos["acme/small"].private
    assert "model.safetensors" in site.desk.arrived("acme/small")
    head = store.repos["acme/small"].resolve("main").sha

    page.open("Convert")
    page.get_by_label("safest").check()
    page.get_by_text("Options of the recipe").click()
    for label, value in (("seq len", "256"), ("max ppl ratio", ""), ("samples", "8")):
        page.get_by_label(label).fill(value)
        page.get_by_label(label).press("Tab")
    page.get_by_label("as a pull request").check()
    page.tells("#preview", "acme/small (there already)")
    page.look("23-pull-request")
    start(page)
    page.tells("#headline", "Pushed: pull request 1 of acme/small")
    assert store.repos["acme/small"].resolve("main").sha == head
    assert store.repos["acme/small"].discussions[0].author == "alice"
    assert "model.safetensors" in site.desk.arrived("acme/small", "refs/pr/1")
    assert page.wrong == []


def test_private_until_its_owner_publishes_it(browser: Any, site: Site) -> None:
    repos = site.desk.hub.store.repos
    page = Page(browser, site.url, 390)
    page.log_in()
    pick(page)
    page.get_by_label("private").check()
    page.tells("#preview", "(new, private)")
    start(page)
    site.desk.work()
    page.tells("#headline", "Pushed: alice/model-rtn-w4g64")
    page.tells("#headline", ", private")
    page.look("27-private")
    publish = page.get_by_role("button", name="Make it public")
    page.once("dialog", lambda question: question.dismiss())
    publish.click()
    page.once("dialog", lambda question: question.accept())
    assert repos["alice/model-rtn-w4g64"].private
    publish.click()
    page.tells("#headline", ", public")
    expect(publish).to_be_hidden()
    assert not repos["alice/model-rtn-w4g64"].private
    page.locator("button.label-wrap", has_text="Log").click()
    expect(page.get_by_label("Log", exact=True)).to_have_value(re.compile("was made public by alice"), timeout=SLOW)
    page.get_by_role("button", name="The card").click()
    page.tells("#card", "Metadata")
    assert drawn(page, "#card") == 2
    page.look("28-published")
    assert page.wrong == []


@pytest.mark.parametrize(("width", "scheme"), WIDTHS, ids=["desk", "phone"])
def test_the_card_is_read_before_the_push(browser: Any, site: Site, width: int, scheme: str) -> None:
    """With "let me look": what was lost, both models' words and the card are there, and nothing is on the Hub yet."""
    page = Page(browser, site.url, width, scheme)
    page.log_in()
    pick(page)
    page.get_by_label("let me look before it is pushed").check()
    start(page)
    site.desk.work()
    page.tells("#headline", "waits for your word before the push")
    page.tells("#history", "waits for your word")
    report = site.desk.service.report(only(site).id, "alice")
    assert report is not None
    page.tells("#comparison", f"{report['evaluation']['perplexity']:.4g}")
    page.tells("#comparison", f"{report['evaluation']['reference_perplexity']:.4g}")
    sample = report["sample"]
    for place, words in (("#before", sample["original"]), ("#after", sample["compressed"])):
        assert words
        expect(page.locator(f"{place} textarea")).to_have_value(sample["prompt"] + words)
    page.get_by_role("button", name="The card").click()
    page.tells("#card", "Metadata")
    page.tells("#card", "base_model: alice/model")
    assert drawn(page, "#card") == 2
    page.look("29-review")
    assert "alice/model-rtn-w4g64" not in site.desk.hub.store.repos
    page.get_by_role("button", name="Push it").click()
    page.tells("#headline", "Pushed: alice/model-rtn-w4g64")
    assert "model.safetensors" in site.desk.arrived("alice/model-rtn-w4g64")
    assert page.wrong == []


def test_what_is_typed_wrong_is_said_and_cannot_be_started(browser: Any, site: Site) -> None:
    page = Page(browser, site.url, 390)
    page.log_in()
    model, begin = page.get_by_label("Model", exact=True), page.locator("#start")

    def typed(place: Any, text: str, said: str, where: str = "#preview") -> None:
        place.fill(text)
        place.press("Enter")
        place.press("Tab")
        page.tells(where, said)
        expect(begin).to_be_disabled()

    for text, said in (
        ("model", "should be `namespace/name`"), ("../../etc/passwd", "should be `namespace/name`"),
        ("https://evil.example/a/b", "should be `namespace/name`"), ("alice/none", "alice/none is not on the Hub"),
        ("<img src=x onerror=alert(1)>/x", "should be `namespace/name`"),
    ):  # fmt: skip
        typed(model, "alice/other", "alice/other is not on the Hub")  # else what is said of the one before would do
        typed(model, text, said)
    page.look("30-wrong-model")
    pick(page)
    expect(begin).to_be_enabled(timeout=SLOW)
    recipe = page.get_by_label("Recipe", exact=True)
    typed(recipe, "gqtp-w4g64", "unknown method `gqtp`")
    typed(recipe, "fit much", "cannot read `much` as a size")
    typed(recipe, "lose 300%", "less than 1")
    page.look("31-wrong-recipe")
    page.get_by_label("safest").check()
    page.get_by_label("quickest to make").check()
    expect(begin).to_be_enabled(timeout=SLOW)
    name = page.locator("#name").get_by_role("textbox")
    typed(name, "a b;c", "namespace/name")
    name.fill("")
    name.press("Tab")
    expect(begin).to_be_enabled(timeout=SLOW)
    page.get_by_text("Options of the recipe").click()
    typed(page.get_by_label("group size"), "2.5", "group_size")
    page.look("32-wrong-option")
    assert site.desk.service.jobs("alice") == []
    assert page.wrong == []


@pytest.fixture
def renting(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A Space that asks for the right to rent machines."""
    with opened(desk, monkeypatch, f"{SCOPES} jobs") as found:
        yield found


def test_what_costs_money_says_how_much(browser: Any, renting: Site, machines: Machines) -> None:
    """From the price, before anything is begun, to a Job on the Hub that is cut off where the money ends."""
    page = Page(browser, renting.url, 1280)
    page.log_in()
    pick(page)
    page.tells("#preview", "free")
    page.get_by_label("on Hugging Face Jobs, billed to you").check()
    expect(page.get_by_label("Hardware")).to_have_value("CPU Basic, 16 GB, $0.01 per hour", timeout=SLOW)
    page.tells("#preview", "at most $0.06, billed to you by Hugging Face")  # six hours and ten minutes
    choose(page, "Hardware", re.compile("A10G"))
    page.tells("#preview", "at most $6.17")
    page.get_by_label("At most, in US dollars").fill("0.1")
    page.get_by_label("At most, in US dollars").press("Tab")
    page.tells("#preview", "0.10 USD buy 6 minutes")
    expect(page.locator("#start")).to_be_disabled()
    page.get_by_label("At most, in US dollars").fill("1.5")
    page.get_by_label("At most, in US dollars").press("Tab")
    page.tells("#preview", "at most $1.50")
    page.look("24-price")
    start(page)
    renting.desk.work(quick)
    page.tells("#headline", "Pushed: alice/model-rtn-w4g64")
    (ran,) = renting.desk.hub.jobs.all
    assert (ran.namespace, ran.spec["flavor"]) == ("alice", "a10g-small")
    assert ran.spec["timeoutSeconds"] == pytest.approx(1.5 * 3600, rel=1e-3)
    page.look("25-rented")
    assert page.wrong == []


def test_examples_without_a_login(browser: Any, site: Site) -> None:
    page = Page(browser, site.url, 390)
    page.tells("#status", "Not logged in")
    page.open("Examples")
    shown = page.locator("#examples .card").first
    expect(shown).to_be_visible(timeout=SLOW)
    expect(shown).to_contain_text("perplexity")
    expect(shown.locator("table").first).to_be_visible()
    assert drawn(page, "#examples .card") >= 3
    page.look("26-examples-logged-out")
    assert page.wrong == []
