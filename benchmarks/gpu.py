"""Low-bit layers on an NVIDIA GPU against cuBLAS in bfloat16.

    python benchmarks/gpu.py [--quick] [--shapes 4096x4096,...] [--rows 1,16,128]

Of each candidate so many copies of the weight are used in turn that no cache holds them, all in one CUDA graph; a time
is the median of its replays, divided by the copies.  What memory can give is measured first, by copying.  Every layer
is compared with a float64 product before it is timed; one that is wrong, or that another kernel than the named would
run, ends the run.  Writes results/gpu.json and results/gpu.md next to this file.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hfquant.machine import versions
from hfquant.runtime import kernels
from hfquant.runtime.kernels.triton.counters import counters
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized

RESULTS = Path(__file__).parent / "results"
COLD = 200e6  # bytes that no cache holds
REPLAYS = 20
TOLERANCE = 0.02  # relative, of layers that round their input to 8 bit
Run = Callable[[Tensor], Tensor]
Make = Callable[[int, int, int], tuple[Run, float]]


def candidates(quick: bool) -> dict[str, Make]:
    """make(out, in, seed) -> what runs, and the bytes of its weight; by name, cuBLAS first."""
    found: dict[str, Make] = {"bf16": _dense}
    for bits in (4,) if quick else range(2, 9):
        found[f"W{bits}A16"] = partial(_layer, Grid(bits, 128), None, "gpu_exact")
    found["W8A8"] = partial(_layer, Grid(8, -1), Activations(), "gpu_rounded")
    found["W4A8"] = partial(_layer, Grid(4, 128), Activations(), "gpu_rounded")
    return found


def _dense(out: int, columns: int, seed: int) -> tuple[Run, float]:
    W = torch.randn(out, columns, dtype=torch.bfloat16, device="cuda")
    return lambda x: F.linear(x, W), W.nbytes


def _layer(
    grid: Grid, activations: Activations | None, name: str, out: int, columns: int, seed: int
) -> tuple[Run, float]:
    draw, groups = torch.Generator().manual_seed(seed), grid.groups(columns)
    Q = Quantized(
        codes=torch.randint(0, grid.top + 1, (out, columns), generator=draw, dtype=torch.uint8),
        scale=(torch.rand(out, groups, generator=draw) * 0.01 + 0.001).half(),
        zero_point=torch.full((out, groups), grid.middle, dtype=torch.uint8),
        grid=grid,
        activations=activations,
    )
    layer = QLinear.from_quantized(Q, None, formats.load("native"), torch.bfloat16).cuda()
    if seed == 0:
        _check(layer, Q, name)
    return layer, out * columns * grid.bits / 8 + Q.scale.nbytes


def _check(layer: QLinear, Q: Quantized, name: str) -> None:
    """The layer is right, and what runs it is the kernel of that name."""
    x = torch.randn(5, Q.shape[1]).bfloat16()
    exact = x.double() @ Q.dequantize().double().T
    choice = kernels.choose(x.cuda(), layer.matrix)
    y = layer(x.cuda()).cpu().double()
    assert choice.kernel.name == name, f"{choice.kernel.name} would run: {dict(choice.refused)[name]}"
    assert not kernels._BROKEN, kernels._BROKEN
    assert (y - exact).norm() < TOLERANCE * exact.norm(), f"{name} is wrong: {(y - exact).norm() / exact.norm()}"


def microseconds(call: Callable[[], Any]) -> float:
    """Of one replay of a graph of it: the median."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call()  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with counters(torch.device("cuda", torch.cuda.current_device())), torch.cuda.graph(graph):
        call()
    times = []
    graph.replay()
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def copying() -> float:
    """Bytes a second read and written by a copy."""
    memory = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(memory)
    return 2e6 * memory.nbytes / microseconds(lambda: target.copy_(memory))


def measure(out: int, columns: int, rows: list[int], quick: bool) -> list[dict[str, Any]]:
    """A line for each number of rows: microseconds a call, and how many times as fast as bf16."""
    lines: list[dict[str, Any]] = [
        {"shape": f"{out}x{columns}", "rows": count, "microseconds": {}, "bytes": {}} for count in rows
    ]
    for name, make in candidates(quick).items():
        first, size = make(out, columns, 0)
        runs = [first, *(make(out, columns, seed)[0] for seed in range(1, max(2, round(COLD / size))))]
        for line in lines:
            x = torch.randn(line["rows"], columns, dtype=torch.bfloat16, device="cuda")
            line["microseconds"][name] = microseconds(lambda x=x, runs=runs: [run(x) for run in runs]) / len(runs)
            line["bytes"][name] = size
    for line in lines:
        taken = line["microseconds"]
        line["ratio_to_bf16"] = {name: taken["bf16"] / t for name, t in taken.items()}
    return lines


def table(document: dict[str, Any]) -> str:
    lines = [
        f"# {document['gpu']}: times as fast as bfloat16 in cuBLAS, in one run",
        "",
        f"torch {document['versions']['torch']}, triton {document['triton']}.  Copying memory: "
        f"{document['copying'] / 1e12:.2f} TB/s.  In brackets: the share of that at which the weight is read.",
        "",
    ]
    names = list(dict.fromkeys(name for row in document["rows"] for name in row["microseconds"]))
    lines += ["| out x in, rows | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for row in document["rows"]:
        cells = []
        for name in names:
            share = 1e6 * row["bytes"][name] / row["microseconds"][name] / document["copying"]
            cells.append(f"{row['ratio_to_bf16'][name]:.2f} ({share:.0%})")
        lines.append(f"| {row['shape']}, {row['rows']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="of the 16-bit kernels, W4 only")
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008", help="out x in")
    parser.add_argument("--rows", default="1,16,64,128,512,2048")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no NVIDIA GPU that torch can use")
    import triton

    document: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "versions": versions(),
        "triton": triton.__version__,
        "copying": copying(),
        "rows": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), kernels.mode("gpu_exact,gpu_rounded"):
        for shape in args.shapes.split(","):
            out, columns = map(int, shape.split("x"))
            document["rows"] += measure(out, columns, list(map(int, args.rows.split(","))), args.quick)
            (args.out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
            (args.out / "gpu.md").write_text(table(document))
            print(table(document), flush=True)


if __name__ == "__main__":
    main()
