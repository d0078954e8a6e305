"""What is shown of a fleet: all of it, and nothing in it can reach out of its cell."""

import json
from html.parser import HTMLParser
from pathlib import Path

from hfquant.conversion.fleet import status
from hfquant.conversion.fleet.reconcile import make_plan
from hfquant.conversion.fleet.sight import Result
from tests.conversion.fleet.recorded import Recorded, made, manifest

EVIL = '"><script>alert(1)</script>'


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        assert not any(name.startswith("on") for name, _ in attrs)


def test_page_and_document_hold_every_pair(tmp_path: Path) -> None:
    metrics = {"perplexity": 31.2, "reference_perplexity": 29.4}
    results = {
        "acme/one-rtn-w8": made("org/one", "1" * 40, "rtn-w8", metrics=metrics),
        "acme/two-rtn-w8": Result(True, "3" * 40, broken=EVIL),
    }
    plan = make_plan(manifest(), Recorded({"org/one": "1" * 40, "org/two": "2" * 40}, results))
    page, document = status.export(plan, tmp_path / "site", "https://hub.example", now=0.0)
    found = json.loads(document.read_text())
    assert [pair["verdict"] for pair in found["pairs"]] == ["missing", "up to date", "foreign"]
    assert found["at"] == "1970-01-01T00:00:00Z"
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert "script" not in tags.found
    assert all(link.startswith("https://hub.example/") for link in tags.links)
    assert "29.4 → 31.2" in text
    assert text.count("<tr>") == 4


def test_the_table_in_markdown_holds_every_pair_and_obeys_none() -> None:
    results = {"acme/two-rtn-w8": Result(True, "3" * 40, broken=f"{EVIL} | [x](javascript:alert(1))")}
    plan = make_plan(manifest(), Recorded({"org/one": "1" * 40, "org/two": "2" * 40}, results))
    text = status.markdown(plan, "https://hub.example", now=0.0)
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) == 3
    assert all(row.count("|") == 7 for row in rows), "nothing makes a column of its own"
    assert "[`org/one`](https://hub.example/org/one)" in text
    (evil,) = [row for row in rows if "script" in row]
    assert EVIL in evil.split("`")[-2], "within a code span"
