"""What somebody tries who does not use the page as it is meant: other people's jobs, files, addresses, large bodies."""

from collections.abc import Callable
from typing import Any

import httpx

from tests.hub.fixtures import TOKENS
from tests.space.conftest import Site, bearer

SEEN = {"job": None, "number": 0, "layers": {}, "log": []}
FILES = ("/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", "/gradio_api/file=README.md",
         "/file=/etc/passwd", "/gradio_api/proxy=http://127.0.0.1/", "/static/../../../etc/passwd",
         "/theme.css/../../etc/passwd")  # fmt: skip
BUTTONS = ("cancel", "resume", "retry", "delete", "again", "publish")


def events(site: Site) -> Callable[[str], list[dict[str, Any]]]:
    """(an element's id) -> the page's own events that it sets off."""
    config = httpx.get(f"{site.url}/config").json()
    ids = {part["id"]: part["props"].get("elem_id") for part in config["components"]}

    def of(element: str) -> list[dict[str, Any]]:
        return [event for event in config["dependencies"] if any(ids.get(i) == element for i, _ in event["targets"])]

    return of


def press(site: Site, event: dict[str, Any], data: list[Any], user: str | None) -> httpx.Response:
    """As the page's script sets an event off, with whatever data."""
    body = {"data": data, "fn_index": event["id"], "session_hash": "x" * 11}
    return httpx.post(f"{site.url}/gradio_api/run/predict", json=body, headers=bearer(user) if user else {})


def test_the_pages_own_events_touch_nobody_elses_job(site: Site) -> None:
    """In the session of its owner even, where gradio has the list of jobs and lets the question pass."""
    job = site.desk.submit()
    of = events(site)
    acts = {name: [event for event in of(name) if len(event["inputs"]) == 1] for name in BUTTONS}
    assert all(acts.values())
    arrive(site, job, "alice")
    for user, said in (("bob", "no such job"), (None, "log in first")):
        for name in BUTTONS:
            for event in acts[name]:
                answer = press(site, event, [job], user)
                assert "alice/" not in answer.text, name
                assert said in answer.text, (name, answer.text)
    assert site.desk.job(job).state == "queued"
    assert press(site, acts["cancel"][0], [job], "alice").status_code == 200
    assert site.desk.job(job).state == "cancelled", "with the same words its owner can"


def arrive(site: Site, job: str, user: str | None) -> str:
    """What the page is told when somebody arrives whose browser remembers a job."""
    shows = showing(site)
    arrival = next(event for event in shows if len(event["inputs"]) == 2)
    return press(site, arrival, [job, dict(SEEN)], user).text


def showing(site: Site) -> list[dict[str, Any]]:
    """The events that fill the tab of jobs."""
    return [event for event in httpx.get(f"{site.url}/config").json()["dependencies"] if len(event["outputs"]) > 15]


def test_a_job_that_is_remembered_in_a_browser_is_shown_to_its_owner_only(site: Site) -> None:
    job = site.desk.submit()
    shows = showing(site)
    assert len(shows) >= 4, "on arrival, each second, after each button"
    for event in shows:
        data: list[Any] = [{**SEEN, "job": job}]
        for user in ("bob", None):
            answer = press(site, event, [job, *data] if len(event["inputs"]) == 2 else data, user)
            assert "alice/" not in answer.text
    assert "alice/model" in arrive(site, job, "alice"), "the question is a right one"


def test_no_file_and_no_address_is_read_for_anybody(site: Site) -> None:
    for path in FILES:
        answer = httpx.get(f"{site.url}{path}")
        assert "root:" not in answer.text, path
        assert answer.status_code in (400, 403, 404, 422), path


def test_nothing_is_told_about_the_server(site: Site) -> None:
    for path in ("/monitoring", "/gradio_api/monitoring", "/docs", "/openapi.json", "/redoc"):
        assert httpx.get(f"{site.url}{path}").status_code in (403, 404), path


def test_large_bodies_are_refused(site: Site) -> None:
    files = {"files": ("big.txt", b"x" * 2_000_000)}
    assert httpx.post(f"{site.url}/gradio_api/upload", files=files).status_code == 413


def test_a_file_in_the_place_of_a_text_is_not_opened(site: Site) -> None:
    for value in ("/etc/passwd", "http://127.0.0.1:1/x", "../../etc/passwd"):
        wish = {"model": {"path": value, "meta": {"_type": "gradio.FileData"}}, "recipe": "rtn-w8"}
        call = httpx.post(f"{site.url}/gradio_api/call/preview", json={"data": [wish]})
        text = call.text
        if call.status_code == 200:
            text = httpx.get(f"{site.url}/gradio_api/call/preview/{call.json()['event_id']}").text
        assert "root:" not in text
        assert "event: complete" not in text or "problems" in text


def test_no_token_is_on_the_page(site: Site) -> None:
    job = site.desk.submit()
    for path in ("/", "/config", "/gradio_api/info"):
        assert TOKENS["alice"] not in httpx.get(f"{site.url}{path}", headers=bearer("alice")).text
    call = httpx.post(f"{site.url}/gradio_api/call/status", json={"data": [job]}, headers=bearer("alice")).json()
    answer = httpx.get(f"{site.url}/gradio_api/call/status/{call['event_id']}", headers=bearer("alice")).text
    assert "alice/model" in answer
    assert TOKENS["alice"] not in answer
