"""A real browser, and what holds for every picture of the page: nothing is cut off or pale, everything has a name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SLOW = 240_000  # ms
SHOTS = os.environ.get("HFQUANT_SCREENSHOTS")  # a folder

# of the page itself: the header that the Hub lays over a Space has links without names
NAMELESS = """() => [...document.querySelectorAll('input:not([type=hidden]), select, textarea, button, a, progress')]
    .filter(e => e.closest('.gradio-container') && e.checkVisibility())
    .filter(e => !(e.labels?.length || e.ariaLabel || e.title || e.textContent.trim()
                   || e.getAttribute('aria-labelledby')))
    .map(e => e.outerHTML.slice(0, 160))"""
# below the parts that scroll by themselves, something may be wider
CUT_OFF = """() => [...document.querySelectorAll('#tabs h3, #tabs p, #tabs li, #tabs button, #tabs input, #tabs td')]
    .filter(e => e.checkVisibility() && !e.closest('.plain, .sr, [role=tablist]'))
    .filter(e => { const box = e.getBoundingClientRect();
                   return box.width && (box.right > innerWidth + 1 || box.left < -1); })
    .map(e => e.outerHTML.slice(0, 160))"""

# WCAG 2.1, 1.4.3: 4.5 to 1, 3 to 1 for large letters; what cannot be used is exempt
PALE = """() => {
    const light = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
    const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const read = text => {  // any notation of a colour, over what is there already
        pen.fillStyle = text; pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data]; };
    const on = e => {  // what is behind an element: all its ancestors' backgrounds, the farthest first
        read('white'); let found = [255, 255, 255];
        for (const one of ancestors(e).reverse()) found = read(getComputedStyle(one).backgroundColor);
        return found; };
    const ancestors = e => e ? [e, ...ancestors(e.parentElement)] : [];
    const shade = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
    return [...document.querySelectorAll('#head *, #tabs *, footer *')]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.value)
        .filter(e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}))
        .filter(e => !e.closest('.sr, svg, canvas, :disabled, [type=radio], [type=checkbox]'))
        .map(e => { const style = getComputedStyle(e), behind = shade(on(e)), ahead = shade(read(style.color));
            const ratio = (Math.max(behind, ahead) + 0.05) / (Math.min(behind, ahead) + 0.05);
            const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
            return [ratio, large ? 3 : 4.5, e]; })
        .filter(([ratio, least]) => ratio < least)
        .map(([ratio, _, e]) => ratio.toFixed(2) + ' ' + e.outerHTML.slice(0, 160)); }"""


class Page:
    """A page of a browser, at a width in pixels."""

    def __init__(self, browser: Any, url: str, width: int, scheme: str = "light") -> None:
        self.url, self.width = url, width
        self.wrong: list[str] = []  # what the page complained of
        self._leaving = False
        context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        self.tab = context.new_page()
        self.tab.set_default_timeout(SLOW)
        # a page of a Space asks the Hub whether the Space runs
        self.tab.route(
            "https://huggingface.co/api/spaces/**",
            lambda route: route.fulfill(
                json={"id": "acme/space", "runtime": {"stage": "RUNNING"}},
                headers={"Access-Control-Allow-Origin": "*"},
            ),
        )
        self.tab.on("pageerror", lambda error: self._heard(str(error)))
        self.tab.on("console", self._said)
        self.tab.goto(url)

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self._heard(message.text, message.location["url"])

    def _heard(self, text: str, source: str = "") -> None:
        """A page that is left breaks off what it was reading; pictures of people the test's Hub has not."""
        elsewhere = "Failed to load resource" in text and not source.startswith(self.url)
        if not self._leaving and not elsewhere:
            self.wrong.append(f"{text} {source}")

    @contextmanager
    def leaving(self) -> Iterator[None]:
        self._leaving = True
        yield
        self._leaving = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tab, name)

    def tells(self, place: str, text: str) -> None:
        """Waits until a part of the page says something."""
        from playwright.sync_api import expect

        expect(self.tab.locator(place)).to_contain_text(text, timeout=SLOW)

    def shows(self, place: str) -> None:
        from playwright.sync_api import expect

        expect(self.tab.locator(place)).to_be_visible(timeout=SLOW)

    def look(self, name: str) -> None:
        """Nothing is cut off or pale, everything that can be used has a name; a picture where one is asked for."""
        if SHOTS:
            self.tab.screenshot(path=str(Path(SHOTS) / f"{name}-{self.width}.png"), full_page=True)
        wide = self.tab.evaluate("document.documentElement.scrollWidth")
        assert wide <= self.width, f"{name}: the page is {wide} pixels wide"
        for said, script in (("cut off", CUT_OFF), ("nameless", NAMELESS), ("pale", PALE)):
            found = self.tab.evaluate(script)
            assert not found, f"{name}: {said}: {found}"

    def log_in(self) -> None:
        """Not before the page has arrived: until then the button does not know whether it logs in or out."""
        self.tells("#status", "Not logged in")
        with self.leaving():
            self.tab.locator("#login").click()
            self.tells("#status", "alice")

    def come_back(self) -> None:
        with self.leaving():
            self.tab.reload()

    def open(self, tab: str) -> None:
        self.tab.get_by_role("tab", name=tab).click()
