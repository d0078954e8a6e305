"""Many people with the page open: how long do its answers take?

    python benchmarks/space_load.py --people 50 --seconds 30 http://127.0.0.1:7860

Each of them looks at a job once a second, as the page's timer does, and now and then asks what a model would cost.
Prints percentiles in seconds.  Start a job first to measure while one runs; with `--token` it is looked at.
"""

import argparse
import asyncio
import json
import time
from typing import Any

import httpx

LOOK, ASK = "jobs", "preview"


async def answered(client: httpx.AsyncClient, name: str, data: list[Any]) -> float:
    """Seconds from the request to the last byte of its result."""
    began = time.perf_counter()
    event = (await client.post(f"/gradio_api/call/{name}", json={"data": data})).json()["event_id"]
    text = (await client.get(f"/gradio_api/call/{name}/{event}")).text
    if "event: complete" not in text:
        raise SystemExit(f"{name} was not answered: {text[:200]}")
    return time.perf_counter() - began


async def person(
    client: httpx.AsyncClient, number: int, until: float, model: str | None, took: dict[str, list[float]]
) -> None:
    await asyncio.sleep(number % 20 / 20)
    turn = number
    while time.perf_counter() < until:
        turn += 1
        name, data = (ASK, [{"model": model, "recipe": "rtn-w8"}]) if model and turn % 15 == 0 else (LOOK, [])
        seconds = await answered(client, name, data)
        took[name].append(seconds)
        await asyncio.sleep(max(0.0, 1.0 - seconds))


async def measure(url: str, people: int, seconds: float, model: str | None, token: str | None) -> dict[str, Any]:
    took: dict[str, list[float]] = {LOOK: [], ASK: []}
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    limits = httpx.Limits(max_connections=people)
    async with httpx.AsyncClient(base_url=url, timeout=120, headers=headers, limits=limits) as client:
        until = time.perf_counter() + seconds
        await asyncio.gather(*(person(client, n, until, model, took) for n in range(people)))
    return {name: percentiles(times) for name, times in took.items() if times}


def percentiles(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    at = {f"p{p}": round(times[min(len(times) - 1, len(times) * p // 100)], 3) for p in (50, 95, 99)}
    return {"answers": len(times), **at}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--model", help="asked about too, once in 15 turns")
    parser.add_argument("--token")
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measure(given.url, given.people, given.seconds, given.model, given.token)), indent=1))


if __name__ == "__main__":
    main()
