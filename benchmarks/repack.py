"""What laying a weight out for the generated kernels takes, which happens once, when a layer is first used.

    python benchmarks/repack.py [--shape 4096x4096] [--rounds 5] [--out benchmarks/results/repack]

Processor time of one thread, best of the rounds, per GB of packed weights and per GB that the same weights take in
bfloat16.  `integer` is for inputs that are rounded, `real` for those that are not; both are made of the same tiles, so
that a layer which is used in both ways pays the larger part once.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from kernels_cpu import quantized
from reporting import write

from hfquant.llvm import machine
from hfquant.machine import hardware, versions
from hfquant.runtime.kernels import _tiles
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.grid import Grid


def measure(bits: int, fmt: str, out: int, columns: int, rounds: int) -> dict[str, Any]:
    """Seconds for a GB, of each way."""
    Q = quantized(out, columns, Grid(bits, 64), None, bits)
    row: dict[str, Any] = {"bits": bits, "format": fmt}
    packed, dense = 0, 2 * out * columns
    for name, real in (("integer", False), ("real", True)):
        best = float("inf")
        for _ in range(rounds + 1):  # the first one compiles
            layer = QLinear.from_quantized(Q, None, formats.load(fmt), torch.bfloat16)
            packed = sum(part.nbytes for part in layer.parts)
            began = time.thread_time()
            _tiles.tiled(layer.matrix, None, real)
            best = min(best, time.thread_time() - began)
        row[f"{name}_s_per_packed_gb"] = round(1e9 * best / packed, 3)
        row[f"{name}_s_per_bf16_gb"] = round(1e9 * best / dense, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="out x in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    out, columns = map(int, args.shape.split("x"))
    cases = [(bits, "native") for bits in range(2, 9)] + [(bits, "compressed_tensors") for bits in (4, 8)]
    rows = []
    for bits, fmt in cases:
        rows.append(measure(bits, fmt, out, columns, args.rounds))
        print(rows[-1], flush=True)
    level = machine.level()
    settings = {"shape": args.shape, "group": 64, "rounds": args.rounds, "threads": 1, "level": level and level.name}
    if args.out:
        write(args.out, {"settings": settings, "hardware": hardware(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
