"""Throughput of generation from disk at the same enforced budget: hfquant's schedule against accelerate's disk offload.

    python benchmarks/offload.py [--gigabytes 2.4] [--limit 1000MB] [--out benchmarks/results/offload]

Builds a Llama-type model with random bfloat16 weights and answers the same prompts in a process per way, each in a
control group (where none can be made, under RLIMIT_DATA), so that the system, not this script, enforces the limit.  A
helper evicts the model's files from the page cache ten times a second: the memory that is not allowed does not help
through the back door.  A rival, and hfquant row by row, answers one batch: the next ones would follow, each as long.
Of a rival's sizes of batches the best that keeps the limit counts; if none does, the best without.  Times are those of
generation alone, after loading.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reporting import write
from synthetic import Shape, bounded, build, evicting

from hfquant.cli.units import read_size
from hfquant.machine import hardware, versions
from hfquant.runtime.offload.policy import EVERY_LAYER

UNLIMITED = ", no limit"  # behind the name of a way that was killed under it, and is shown without


def child(given: dict[str, Any]) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("offload_ways.py")), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:
        return {"failed": "killed for taking more memory"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said | {"tokens_per_second": said["tokens"] / said["undisturbed"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--limit", type=read_size, default="1000MB")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--prompt-len", type=int, default=8)
    parser.add_argument("--gen-len", type=int, default=8)
    parser.add_argument("--model", type=Path, help="where the model is built, or is since an earlier run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that compute")
    parser.add_argument("--dtype", default="float32", help="what is computed with")
    parser.add_argument("--rivals", default="accelerate", help="airllm too, where it is installed")
    parser.add_argument("--rival-batches", type=lambda s: [int(n) for n in s.split(",")], default=[8, 32, 96])
    parser.add_argument("--batch", type=int, default=16, help="of the policies that are not solved")
    parser.add_argument(
        "--only", default="", help="run only the ways with one of these in their names, after commas; keep others"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/offload"))
    given = parser.parse_args()
    limit = given.limit if isinstance(given.limit, int) else read_size(given.limit)
    work = {"prompts": given.prompts, "length": given.prompt_len, "new": given.gen_len, "dtype": given.dtype}
    work["threads"] = given.threads
    before = given.out.with_suffix(".json")
    rows = json.loads(before.read_text())["rows"] if given.only and before.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.model or Path(temporary) / "model"
        if not folder.is_dir():
            build(folder, round(given.gigabytes * 1e9 / Shape().block))
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        with evicting(folder), bounded(limit) as group:
            enforced = {"limit": limit, "group": str(group[1])} if group else {"limit": limit}
            for name, way in ways(given):
                if any(word in name for word in given.only.split(",")):
                    rows |= measured(name, {"folder": str(folder), **enforced, **work, **way})
    by = group[0] if group else "RLIMIT_DATA"
    settings = {"weights_bytes": weights, "limit_bytes": limit, "limited_by": by, "batch": given.batch, **work}
    document = {"settings": settings, "hardware": hardware(), "versions": versions(), "rows": rows}
    write(given.out, document, table(document))


def measured(name: str, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One way under the limit, and where it fails also without."""
    rows = {name: child(given)}
    print(name, rows[name], flush=True)
    if "failed" in rows[name]:
        name += UNLIMITED
        rows[name] = child({**given, "limit": 0, "group": None})
        print(name, rows[name], flush=True)
    return rows


def ways(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names, and what `offload_ways.py` is told; no policy: the solved one."""
    yield "hfquant, solved policy", {"way": "ours", "policy": None}
    disk = {"cache_on_disk": EVERY_LAYER}
    whole, some = -(-given.prompts // given.batch), {"prompts": given.batch}
    for name, few, policy in (
        ("hfquant, zig-zag", {}, {"batches": whole, "depth": 1, **disk}),
        ("hfquant, zig-zag without overlap", {}, {"batches": whole, "depth": 0, **disk}),
        ("hfquant, row by row", some, {"batches": 1, "depth": 1}),
        ("hfquant, row by row without overlap", some, {"batches": 1, "depth": 0}),
    ):
        yield name, {"way": "ours", "policy": {"batch": given.batch, **policy}, **few}
    for rival in filter(None, given.rivals.split(",")):
        for batch in (size for size in given.rival_batches if size <= given.prompts):
            yield f"{rival}, batch {batch}", {"way": rival, "batch": batch, "prompts": batch}


def _best(speed: dict[str, float], rival: str) -> float:
    """Of a rival's sizes of batches that keep the limit; of the others only where none does."""
    own = {name: value for name, value in speed.items() if name.startswith(rival)}
    return max((v for name, v in own.items() if not name.endswith(UNLIMITED)), default=max(own.values(), default=0.0))


def table(document: dict[str, Any]) -> str:
    """Every way against the best of each rival."""
    s, h, rows = document["settings"], document["hardware"], document["rows"]
    speed = {name: row["tokens_per_second"] for name, row in rows.items() if "tokens" in row}
    rivals = list(dict.fromkeys(name.split(",")[0] for name in rows if not name.startswith("hfquant")))
    best = {rival: _best(speed, rival) for rival in rivals}
    lines = [
        f"Weights {s['weights_bytes'] / 1e9:.2f} GB in bfloat16, computed in {s['dtype']}; "
        f"{s['limit_bytes'] / 1e6:.0f} MB of memory ({s['limited_by']}), "
        f"{s['prompts']} prompts of {s['length']} tokens, {s['new']} new ones each, "
        f"in batches of {s['batch']} where hfquant's policy is not solved.  "
        f"{h['processor']}, {s['threads']} threads compute; without waiting for a processor that others had.  "
        "Peaks are resident sets: with pages of files, for which the limit need not count.",
        "",
        "| | tokens/s | seconds | peak MB | " + " | ".join(f"against {rival}'s best" for rival in rivals) + " |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * len(rivals),
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | fails: {row['failed']} | | |" + " |" * len(rivals))
            continue
        ratios = [f"{speed[name] / best[rival]:.2f}x" if best[rival] else "" for rival in rivals]
        numbers = f"{speed[name]:.2f} | {row['undisturbed']:.1f} | {row['peak'] / 1e6:.0f}"
        lines.append(f"| {name} | {numbers} | " + " | ".join(ratios) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
