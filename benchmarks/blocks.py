"""Processor seconds that recipes take for a block of a model, in one run, from a few of its blocks.

    OMP_NUM_THREADS=1 python benchmarks/blocks.py MODEL --calibration CAL.txt --recipes gptq-w4g64 sparsegpt-50 ... \
        [--samples 32] [--blocks 4] [--out RESULT]

Each recipe runs in a process of its own, and is stopped behind that many blocks.  The first one does not count: code is
compiled in it, and embeddings are read.  The blocks of a language model are all alike, so this is what the whole takes,
less what is read and written once.  A recipe may carry changes behind a comma: `sparsegpt-50,sparsegpt.admm=0`.

Processor seconds are of all threads together, and of this process alone: other work on the machine raises them a
little, through its caches, and not by its share.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from reporting import write

from hfquant.machine import hardware, versions

CHILD = """
import json, sys, tempfile, time
from hfquant.compress import compress
from hfquant.recipe import Recipe
model, recipe, calibration, samples, seq_len, blocks = json.loads(sys.argv[1])
recipe, *changes = recipe.split(",")
with tempfile.TemporaryDirectory() as out:
    at, block, errors = [], 0, []
    recipe = Recipe.parse(recipe, changes)
    layers = compress(model, recipe, out, calibration=calibration, samples=samples, seq_len=seq_len)
    for layer in layers:
        if layer.block != block:  # the next block's first layer: its statistics are in, as those of all others are
            at, block = [*at, time.process_time()], layer.block
        if block > blocks:
            break
        errors += [layer.error]
    layers.close()
print(json.dumps({"seconds": [b - a for a, b in zip(at, at[1:])], "error": sum(errors) / len(errors)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="default")
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--out", type=Path, help="without ending; .json and .md are added")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for recipe in args.recipes:
        rows.append(measure(args, recipe))
        rows[-1]["of_the_first"] = round(rows[-1]["per_block"] / rows[0]["per_block"], 3)
        print(rows[-1], flush=True)
    if args.out:
        record(args, rows)


def measure(args: argparse.Namespace, recipe: str) -> dict[str, Any]:
    given = [args.model, recipe, args.calibration, args.samples, args.seq_len, args.blocks]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(given)], check=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout)
    seconds = [round(each, 2) for each in found["seconds"]]
    if not seconds:
        raise SystemExit(f"{recipe}: the model has no more blocks than are left out")
    return {"recipe": recipe, "per_block": round(median(seconds), 2), "blocks": seconds,
            "mean_layer_error": round(found["error"], 5)}  # fmt: skip


def record(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    settings = {"model": Path(args.model).name, "calibration": Path(args.calibration).name, "samples": args.samples,
                "seq_len": args.seq_len, "hardware": hardware(), "versions": versions()}  # fmt: skip
    lines = ["| recipe | processor seconds per block | of the first | mean layer error |", "|---|---:|---:|---:|"]
    for r in rows:
        lines.append(f"| {r['recipe']} | {r['per_block']} | {r['of_the_first']} | {r['mean_layer_error']} |")
    lines += ["", f"{settings['model']}; calibration {settings['calibration']}, {args.samples} x {args.seq_len} tokens;"
              f" the median of {len(rows[0]['blocks'])} blocks; {settings['hardware']['processor']},"
              f" {settings['hardware']['threads']} thread."]  # fmt: skip
    write(args.out, {"settings": settings, "rows": rows}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
