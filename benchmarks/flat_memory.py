"""Peak memory of compression against depth: a model of L identical blocks needs what one block needs.

    python benchmarks/flat_memory.py [--gigabytes 3] [--limit 2GB] [--out benchmarks/results/flat_memory]

Builds two Llama-type models with random bfloat16 weights, 8 blocks and as many as make the given size, writes
them shard by shard, and compresses each in a process of its own; the large one under RLIMIT_DATA, so that the
system, not this script, enforces the limit.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from reporting import write
from synthetic import Shape, build

from hfquant.machine import hardware, versions

SHAPE = Shape(1536, 3072, 16, 16, 2048)
CHILD = """
import resource, sys
if int(sys.argv[4]):
    resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[4]),) * 2)
from hfquant.compress import compress
from hfquant.machine import peak_memory
model, out, recipe = sys.argv[1:4]
for _ in compress(model, recipe, out, calibration=model + "/tokens.npy", samples=16, seq_len=256):
    pass
print(peak_memory())
"""


def run(folder: Path, recipe: str, limit: int) -> int:
    out = folder.with_name(folder.name + ".out")
    command = [sys.executable, "-c", CHILD, str(folder), str(out), recipe, str(limit)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(out)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument("--limit", type=float, default=2.0, help="GB of data memory for the large model")
    parser.add_argument("--recipe", default=str(Path(__file__).with_suffix(".yaml")))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    deep = max(64, round(args.gigabytes * 1e9 / SHAPE.block))
    rows = []
    with tempfile.TemporaryDirectory(prefix="flat-") as work:
        for blocks, limit in ((8, 0), (deep, int(args.limit * 1e9))):
            folder = Path(work) / str(blocks)
            size = build(folder, blocks, SHAPE, shard=500_000_000)
            np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, SHAPE.vocabulary, 16 * 256 + 1))
            peak = run(folder, args.recipe, limit)
            shutil.rmtree(folder)
            rows.append(
                {
                    "blocks": blocks,
                    "model_GB": round(size / 1e9, 2),
                    "limit_GB": limit / 1e9 or None,
                    "peak_MB": round(peak / 1e6),
                }
            )
            print(rows[-1], flush=True)
    ratio = rows[1]["peak_MB"] / rows[0]["peak_MB"]
    print(f"peak of {deep} blocks / peak of 8 blocks = {ratio:.3f}")
    if args.out:
        document = {
            "recipe": Path(args.recipe).stem,
            "calibration": "16 x 256 random tokens",
            "rows": rows,
            "ratio": round(ratio, 3),
            "hardware": hardware(),
            "versions": versions(),
        }
        write(args.out, document)


if __name__ == "__main__":
    main()
