"""What the page says a job will take, beside what it took: `hfquant space`, its worker, a Hub of its own on loopback.

python benchmarks/space_times.py MODEL_FOLDER... --recipes rtn-w8 gptq-w4g64 --out benchmarks/results/space_times
"""

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import httpx
from reporting import write
from space_load import call, page

from hfquant.machine import hardware, versions


async def one(url: str, model: str, recipe: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        wish = {"model": "alice/model", "recipe": recipe, "target": f"alice/{recipe}"}
        found = await call(client, "preview", [wish])
        refused = [problem["message"] for problem in found["problems"] if problem["blocks"]]
        if refused and (longest := refused[0].rpartition("the model's ")[2]).isdigit():
            wish |= {"changes": [f"calibration.seq_len={longest}"]}
            found = await call(client, "preview", [wish])
        began, load = time.perf_counter(), os.getloadavg()[0]
        job = (await call(client, "submit", [wish]))["id"]
        while (now := await call(client, "status", [job]))["state"] in ("queued", "running"):
            await asyncio.sleep(0.2)
        took = time.perf_counter() - began
    steps = {step["name"]: round(step["seconds"] or 0, 1) for step in now["steps"]}
    low, high = found["seconds"]
    return {
        "model": model, "recipe": recipe, "state": now["state"], "said": [round(low, 1), round(high, 1)],
        "took": round(took, 1), "within": low <= took <= high, "steps": steps, "load_average": round(load, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--recipes", nargs="+", default=["rtn-w8", "gptq-w4g64"])
    parser.add_argument("--port", type=int, default=7873)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for folder in given.folders:
        with page(folder, given.port) as url:
            for recipe in given.recipes:
                rows.append(asyncio.run(one(url, folder.name, recipe)))
                print(json.dumps(rows[-1]), flush=True)
    if given.out:
        write(given.out, {"rows": rows, "hardware": hardware(), "versions": versions()})


if __name__ == "__main__":
    main()
