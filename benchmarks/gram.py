"""Sums over calibration tokens, xᵀx and the drift's xᵀy: generated code beside torch, in turns.

    OMP_NUM_THREADS=1 python benchmarks/gram.py [--tokens 512,2048] [--rounds 9] --out benchmarks/results/gram

`whole`: x.float().T @ x.float().  `panels`: what runs without generated code, half of the arithmetic.  `drift`: xᵀy by
generated code; `rounded`: xᵀy in x's own type, for bfloat16 the one product that torch is quick at, and not exact.
Milliseconds are medians of the rounds; of one thread its processor time, else wall clock.  `of_whole`, `of_panels` and
`drift_of_rounded` are medians of each round's own ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from reporting import write
from torch import Tensor

from hfquant.machine import hardware, versions
from hfquant.runtime import gram

ENOUGH = 0.1  # seconds of `whole`, below which there are more rounds
WIDTHS = (64, 576, 1536, 2048, 4096)


def panels(S: Tensor, x: Tensor) -> None:
    """As without generated code."""
    with patch.object(gram, "refused", lambda *_: "to compare"):
        gram.add_gram(S, x)


def seconds(work: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def measure(n: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    x, y, S = torch.randn(tokens, n).to(dtype), torch.randn(tokens, n).to(dtype), torch.zeros(n, n)
    ways: dict[str, Callable[[], object]] = {
        "whole": lambda: S.addmm_(x.float().T, x.float()),
        "panels": lambda: panels(S, x),
        "generated": lambda: gram.add_gram(S, x),
        "drift": lambda: gram.add_product(S, y, x),
        "rounded": lambda: S.add_(y.T @ x),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # compiles and warms up
    while len(found["whole"]) < rounds or sum(found["whole"]) < ENOUGH:
        for name, way in ways.items():
            found[name].append(seconds(way))

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(found[a], found[b], strict=True)), 3)

    return {
        "n": n,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_ms": round(1e3 * statistics.median(times), 2) for name, times in found.items()},
        "of_whole": ratio("generated", "whole"),
        "of_panels": ratio("generated", "panels"),
        "drift_of_rounded": ratio("drift", "rounded"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="512,2048", help="in a batch")
    parser.add_argument("--rounds", type=int, default=9, help="at least")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for dtype, tokens, n in product((torch.bfloat16, torch.float32), map(int, args.tokens.split(",")), WIDTHS):
        rows.append(measure(n, tokens, dtype, args.rounds))
        print(rows[-1], flush=True)
    settings = {"rounds": args.rounds, "threads": torch.get_num_threads(),
                "hardware": hardware(), "versions": versions()}  # fmt: skip
    if args.out:
        write(args.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
