"""One query over a long cache: packed keys and values by generated code, beside what else could be done.

    OMP_NUM_THREADS=1 python benchmarks/kv_attention.py [--seconds 1] [--out benchmarks/results/kv_attention]

`generated`, `rounded` (queries in 8 bit) and `torch` read the packed cache; `decoded` decodes it and attends by torch's
sdpa; `sdpa`: over keys and values that were never packed, as transformers calls it; `grouped`: the same, told that the
queries of a head are several tokens' that look at the same keys.  All in bfloat16, a batch of one, in turns, cold.
Milliseconds are medians; of one thread its processor time, else wall clock; ratios are medians of each round's own,
below 1 where `generated` is faster.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from reporting import write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hfquant.machine import hardware, versions
from hfquant.runtime.kv_cache import GROUP, WINDOW, CompressedLayer
from hfquant.runtime.kv_packed import attend_reference
from hfquant.runtime.llvm import attention

SHAPES = ((9, 3, 64), (14, 2, 64), (32, 8, 128), (32, 32, 128))  # query heads, heads, channels
COLD = 1 << 26  # bytes that are read in between, so that no cache holds keys and values: as between layers


def seconds(work: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def measure(shape: tuple[int, int, int], tokens: int, bits: int, enough: float) -> dict[str, object]:
    queries, heads, size = shape
    q = torch.randn(1, queries, size).bfloat16()
    keys, values = (torch.randn(1, heads, tokens, size).bfloat16() for _ in range(2))
    layer, scale, other = CompressedLayer(bits, WINDOW, GROUP), size**-0.5, torch.zeros(COLD, dtype=torch.uint8)
    layer.update(keys, values)
    recent, packed = (layer.keys, layer.values), layer.tokens
    rounded = replace(packed, queries=8)

    def dense(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)

    def decoded() -> Tensor:
        k, v = layer.tokens.keys(q.dtype), layer.tokens.values(q.dtype)
        return dense(torch.cat([k, recent[0]], 2), torch.cat([v, recent[1]], 2))

    def grouped() -> Tensor:
        return scaled_dot_product_attention(q.view(1, heads, -1, size), keys, values)

    ways: dict[str, Callable[[], object]] = {
        "generated": lambda: attention.attend(q, packed, recent, scale, None),
        "rounded": lambda: attention.attend(q, rounded, recent, scale, None),
        "torch": lambda: attend_reference(q, packed, recent, scale),
        "decoded": decoded,
        "sdpa": lambda: dense(keys, values),
        "grouped": grouped,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # compiles and warms up
    end = time.perf_counter() + enough
    while len(found["sdpa"]) < 5 or time.perf_counter() < end:
        for name, way in ways.items():
            other.sum()
            found[name].append(seconds(way))
    row: dict[str, object] = {"query_heads": queries, "heads": heads, "channels": size, "tokens": tokens, "bits": bits}
    row["rounds"] = len(found["sdpa"])
    row |= {f"{name}_ms": round(1e3 * statistics.median(times), 3) for name, times in found.items()}
    for name in list(ways)[1:]:
        ratios = (a / b for a, b in zip(found["generated"], found[name], strict=True))
        row[f"of_{name}"] = round(statistics.median(ratios), 3)
    return row


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1024,4096")
    parser.add_argument("--bits", default="8,4")
    parser.add_argument("--seconds", type=float, default=1, help="for each shape, at least")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for bits, tokens, shape in product(numbers(args.bits), numbers(args.tokens), SHAPES):
        rows.append(measure(shape, tokens, bits, args.seconds))
        print(rows[-1], flush=True)
    settings = {
        "threads": torch.get_num_threads(), "window": WINDOW, "group": GROUP, "batch": 1, "dtype": "bfloat16",
        "seconds": args.seconds, "cold_bytes": COLD, "load": os.getloadavg()[0],
        "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    if args.out:
        write(args.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
