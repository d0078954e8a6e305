"""Seconds that GPTQ takes for layers of a model's shapes: in torch alone, in generated code, and in another checkout.

    python benchmarks/solver.py --shapes 960x576 576x576 3072x576 576x1536 --before CHECKOUT --out RESULT

The ways take turns, each in a process of its own, with OMP_NUM_THREADS as it is; the least of all turns counts.
Weights and inputs are random, correlated and with a few loud channels; f is what is lost, summed over the layers:
tr((Q − W) H (Q − W)ᵀ).  On a machine that does other work too, compare processor seconds.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from reporting import write

from hfquant.machine import hardware, versions

CHILD = """
import json, sys, time
import torch
from hfquant.methods.gptq import Method
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Layer

shapes, options, bits, group, turns = json.loads(sys.argv[1])

def layer(out, n):
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(out, n, generator=draw) * 0.05
    X = (torch.randn(n, n, generator=draw) / n**0.5 + 0.3 * torch.eye(n)) @ torch.randn(n, 4096, generator=draw)
    X[:: n // 6] *= 6
    C = X + 0.1 * torch.randn(X.shape, generator=draw)
    return Layer(name="layer", W=W, H=X @ X.T / 2048, C=C @ X.T / 2048)

method, rows = Method(**options), []
for out, n in shapes:
    given, best = layer(out, n), [1e9, 1e9]
    for _ in range(turns):
        start, used = time.perf_counter(), time.process_time()
        done = method(given, Grid(bits, group), torch.bfloat16)
        best = [min(best[0], time.perf_counter() - start), min(best[1], time.process_time() - used)]
    D = (done.effective - given.W).double()
    rows.append([*best, float((D @ given.H.double() * D).sum())])
print(json.dumps(rows))
"""
HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["960x576", "576x576", "3072x576", "576x1536"], help="OUTxIN")
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--options", type=json.loads, default={}, help="of gptq, as JSON")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="without ending")
    args = parser.parse_args()
    ways: dict[str, tuple[Path, str]] = {"torch": (HERE, "reference"), "generated": (HERE, "auto")}
    if args.before:
        ways = {"before": (args.before, "auto"), **ways}
    found: dict[str, list[list[list[float]]]] = {way: [] for way in ways}
    for _ in range(args.turns):
        for way, (folder, kernels) in ways.items():
            found[way].append(child(args, folder, kernels))
    rows = [row(args.shapes, way, turns) for way, turns in found.items()]
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "before")}
    settings |= {"threads": os.environ.get("OMP_NUM_THREADS", "all"), "hardware": hardware(), "versions": versions()}
    write(args.out, {"settings": settings, "rows": rows})
    print(json.dumps(rows, indent=1))


def child(args: argparse.Namespace, folder: Path, kernels: str) -> list[list[float]]:
    """(seconds, processor seconds, f) of every shape; the first of two rounds compiles."""
    given = [[list(map(int, s.split("x"))) for s in args.shapes], args.options, args.bits, args.group, 2]
    env = {**os.environ, "PYTHONPATH": str(folder), "HFQUANT_KERNELS": kernels}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(given)], check=True, stdout=subprocess.PIPE, text=True, env=env
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def row(shapes: list[str], way: str, turns: list[list[list[float]]]) -> dict[str, Any]:
    best = [[min(turn[i][k] for turn in turns) for k in (0, 1)] for i in range(len(shapes))]
    return {
        "way": way,
        "seconds": round(sum(wall for wall, _ in best), 3),
        "processor_seconds": round(sum(cpu for _, cpu in best), 3),
        "by_shape": {s: round(cpu, 3) for s, (_, cpu) in zip(shapes, best, strict=True)},
        "f": round(sum(layer[2] for layer in turns[0]), 4),
    }


if __name__ == "__main__":
    main()
