"""Many people with the page open while a job runs: how long do its answers take, and how soon is the page there?

    python benchmarks/space_load.py MODEL_FOLDER --people 50 --seconds 60 --out benchmarks/results/space_load

Starts a Hub of its own with that model, and `hfquant space` before it; begins a conversion by GPTQ.  Each person's page
asks what is new of the job once a second, as its timer does; a third of a person's turns are what a person does: come
back to the page, look at the cost of a recipe, choose a model.  Times are seconds from the request to the last byte.
With playwright and Chromium the first paint is measured too.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import httpx
from reporting import write

from hfquant.machine import hardware, versions
from tests.hub.fixtures import TOKENS
from tests.hub.server import Hub

RECIPE = "gptq-w4g64"
NEVER = {"job": None, "number": 0, "layers": {}, "log": []}


@dataclass
class Events:
    """The page's own events, by what they do."""

    tick: int
    arrive: int
    times: dict[str, list[float]] = field(default_factory=lambda: {"tick": [], "arrive": [], "preview": [], "jobs": []})

    @classmethod
    def read(cls, url: str) -> "Events":
        events = httpx.get(f"{url}/config").json()["dependencies"]
        tick = next(event["id"] for event in events if event["targets"][0][1] == "tick")
        return cls(tick, next(event["id"] for event in events if len(event["outputs"]) > 15))


async def event(client: httpx.AsyncClient, number: int, data: list[Any], session: str) -> None:
    body = {"data": data, "fn_index": number, "session_hash": session}
    (await client.post("/gradio_api/run/predict", json=body)).raise_for_status()


async def call(client: httpx.AsyncClient, name: str, data: list[Any]) -> Any:
    asked = (await client.post(f"/gradio_api/call/{name}", json={"data": data})).json()["event_id"]
    text = (await client.get(f"/gradio_api/call/{name}/{asked}")).text
    _, complete, last = text.partition("event: complete\ndata: ")  # before it, signs that it is worked on
    if not complete:
        raise SystemExit(f"{name} was not answered: {text[:200]}")
    return json.loads(last.splitlines()[0])[0]


async def person(client: httpx.AsyncClient, events: Events, number: int, until: float, job: str) -> None:
    session = f"person{number:06d}"
    await asyncio.sleep(number % 20 / 20)
    acts = {
        "arrive": lambda: event(client, events.arrive, [job, NEVER], session),
        "tick": lambda: event(client, events.tick, [NEVER], session),
        "preview": lambda: call(client, "preview", [{"model": "alice/model", "recipe": RECIPE}]),
        "jobs": lambda: call(client, "jobs", []),
    }
    turn = number
    await acts["arrive"]()
    while time.perf_counter() < until:
        turn += 1
        name = ("arrive", "preview", "jobs")[turn // 15 % 3] if turn % 15 == 0 else "tick"
        began = time.perf_counter()
        await acts[name]()
        events.times[name].append(time.perf_counter() - began)
        await asyncio.sleep(max(0.0, 1.0 - (time.perf_counter() - began)))


async def measure(url: str, people: int, seconds: float, job: str) -> dict[str, Any]:
    events = Events.read(url)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=people)) as client:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(person(client, events, n, until, job) for n in range(people)))
        state = (await call(client, "status", [job]))["state"]
    every = [second for times in events.times.values() for second in times]
    actions = [second for name, times in events.times.items() if name != "tick" for second in times]
    rows = {**events.times, "actions": actions, "all": every}
    return {"job_at_the_end": state, "answers": {name: percentiles(times) for name, times in rows.items() if times}}


def percentiles(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    at = {f"p{p}": round(times[min(len(times) - 1, len(times) * p // 100)], 3) for p in (50, 95, 99)}
    return {"answers": len(times), **at}


def first_paint(url: str) -> list[float] | None:
    """Seconds to the first contentful paint, in five browsers that have never been here; None without a browser."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        found = []
        for _ in range(5):
            page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
            page.goto(url)
            page.locator("#status").get_by_text("For you").wait_for(timeout=60_000)
            milliseconds = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            found.append(round(milliseconds / 1000, 2))
            page.context.close()
        browser.close()
    return found


@contextmanager
def page(folder: Path, port: int) -> Iterator[str]:
    """`hfquant space` before a Hub of its own, with a worker beside it -> its URL."""
    work = Path(tempfile.mkdtemp(prefix="hfquant-load-"))
    with Hub(work / "hub") as hub:
        hub.store.tokens |= {token: user for user, token in TOKENS.items()}
        hub.store.upload("alice/model", folder)
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKENS["alice"], "HF_HOME": str(work / "home"),
               "HFQUANT_FOLDER": str(work / "data"), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        words = [sys.executable, "-m", "hfquant", "space", "--port", str(port)]
        running = subprocess.Popen(words, env=os.environ | own)
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                try:
                    httpx.get(url).raise_for_status()
                    break
                except httpx.TransportError:
                    if running.poll() is not None:
                        raise SystemExit("the page did not start") from None
                    time.sleep(0.5)
            yield url
        finally:
            running.terminate()
            running.wait(60)
            shutil.rmtree(work, ignore_errors=True)


async def begin(url: str) -> str:
    """A conversion; it has begun to compress."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        wish = {"model": "alice/model", "recipe": RECIPE, "target": "alice/small"}
        job = (await call(client, "submit", [wish]))["id"]
        while True:
            found = await call(client, "status", [job])
            if found["state"] not in ("queued", "running"):
                raise SystemExit(f"the job is {found['state']}: {found['failure']}")
            if any((step["name"], step["state"]) == ("compress", "running") for step in found["steps"]):
                break
            await asyncio.sleep(1)
        await asyncio.sleep(10)  # its child has read the model
        return job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--port", type=int, default=7872)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    settings = {"model": given.folder.name, "recipe": RECIPE, "people": given.people, "seconds": given.seconds}
    with page(given.folder, given.port) as url:
        load = [round(os.getloadavg()[0], 1)]
        idle = first_paint(url)
        job = asyncio.run(begin(url))
        busy = first_paint(url)
        row = asyncio.run(measure(url, given.people, given.seconds, job))
        load.append(round(os.getloadavg()[0], 1))
    row |= {"first_paint": {"no job": idle, "a job runs": busy}, "load_average_before_and_after": load}
    print(json.dumps(row, indent=1))
    if given.out:
        write(given.out, {"settings": settings, **row, "hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
