"""Sums of xᵀx over calibration tokens: generated code beside torch, the three in turns.

    python benchmarks/gram.py [--tokens 2048] [--rounds 9] --out benchmarks/results/gram

`whole`: x.float().T @ x.float().  `panels`: what runs without generated code, half of the arithmetic.  Milliseconds are
medians of the rounds, wall clock, torch's threads; the ratios are medians of each round's own.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from reporting import write
from torch import Tensor

from hfquant.machine import hardware, versions
from hfquant.runtime import gram

WIDTHS = (576, 1536, 2048, 4096)


def panels(S: Tensor, x: Tensor) -> None:
    """As without generated code."""
    kept, gram.generated = gram.generated, lambda: False  # type: ignore[assignment]
    try:
        gram.add_gram(S, x)
    finally:
        gram.generated = kept


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(n: int, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    x, S = torch.randn(tokens, n).to(dtype), torch.zeros(n, n)
    ways: dict[str, Callable[[], object]] = {
        "whole": lambda: S.addmm_(x.float().T, x.float()),
        "panels": lambda: panels(S, x),
        "generated": lambda: gram.add_gram(S, x),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            took = seconds(way)
            if i:  # the first one compiles and warms up
                found[name].append(took)
    ours = found["generated"]
    return {
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_ms": round(1e3 * statistics.median(times), 2) for name, times in found.items()},
        "of_whole": round(statistics.median(a / b for a, b in zip(ours, found["whole"], strict=True)), 3),
        "of_panels": round(statistics.median(a / b for a, b in zip(ours, found["panels"], strict=True)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for n in WIDTHS:
            rows.append(measure(n, args.tokens, dtype, args.rounds))
            print(rows[-1], flush=True)
    settings = {"tokens": args.tokens, "rounds": args.rounds, "threads": torch.get_num_threads(),
                "hardware": hardware(), "versions": versions()}  # fmt: skip
    if args.out:
        write(args.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
