"""Low-bit layers on an NVIDIA GPU against cuBLAS in bfloat16.

    python benchmarks/gpu.py [--quick] [--shapes 4096x4096,...] [--rows 1,16,128] [--model MODEL] [--tune]

Of each candidate so many copies of the weight are used in turn that no cache holds them, all in one CUDA graph; a time
is the median of its replays, divided by the copies.  What memory can give is measured first, by copying.  Every layer
is compared with a float64 product before it is timed; one that is wrong, or that another kernel than the named would
run, ends the run.  gemlite and Humming run beside them where they are installed (`gpu_rivals`).  --model decodes a
whole model, too; --tune first measures the sizes that the kernels run with, and keeps the fastest for this GPU.

Writes results/gpu.json and results/gpu.md next to this file.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_decode import whole_model
from gpu_rivals import rivals
from gpu_timing import copies, microseconds
from gpu_tune import tune
from reporting import write
from torch import Tensor

from hfquant.machine import versions
from hfquant.runtime import kernels
from hfquant.runtime.kernels.triton import configs
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized

RESULTS = Path(__file__).parent / "results"
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
    return found | rivals()[0]


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
        runs = [first, *(make(out, columns, seed)[0] for seed in range(1, copies(size)))]
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
    lines += [f"{name} left out: {reason}." for name, reason in document["left_out"].items()] + [""]
    names = list(dict.fromkeys(name for row in document["rows"] for name in row["microseconds"]))
    lines += ["| out x in, rows | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for row in document["rows"]:
        cells = []
        for name in names:
            share = 1e6 * row["bytes"][name] / row["microseconds"][name] / document["copying"]
            cells.append(f"{row['ratio_to_bf16'][name]:.2f} ({share:.0%})")
        lines.append(f"| {row['shape']}, {row['rows']} | " + " | ".join(cells) + " |")
    for line in document["decode"]:
        graph = f"no graph: {line['eager']}" if line["eager"] else "one graph per token"
        speed = f"{1 / line['seconds']:.0f} tokens/s, {line['ratio_to_bf16']:.2f} times bf16"
        lines += ["", f"{document['model']}, batch 1, {line['grid']}: {speed} ({graph})."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="of the 16-bit kernels, W4 only")
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008", help="out x in")
    parser.add_argument("--rows", default="1,16,64,128,512,2048")
    parser.add_argument("--model", help="a folder or Hub id to decode as a whole, in bf16 and in 4 and 8 bits")
    parser.add_argument("--tune", action="store_true", help="measure the kernels' sizes first, and keep the fastest")
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
        "left_out": rivals()[1],
        "rows": [],
        "model": args.model,
        "decode": [],
    }
    rows = list(map(int, args.rows.split(",")))
    with torch.no_grad(), kernels.mode("gpu_exact,gpu_rounded"):
        for shape in args.shapes.split(","):
            out, columns = map(int, shape.split("x"))
            if args.tune:
                _tune((out, columns), rows, args.quick)
            document["rows"] += measure(out, columns, rows, args.quick)
            write(args.out / "gpu", document, table(document))
            print(table(document), flush=True)
    if args.model:
        document["decode"] = whole_model(args.model, [Grid(4, 64, True), Grid(8, 64, True)], "cuda")
        write(args.out / "gpu", document, table(document))
        print(table(document), flush=True)


def _tune(shape: tuple[int, int], rows: list[int], quick: bool) -> None:
    gpu = configs.gpu(torch.device("cuda", torch.cuda.current_device()))
    few = [count for count in rows if count <= configs.most_rows(gpu)]
    for bits in (4,) if quick else range(2, 9):
        tune(gpu, Grid(bits, 128), few, shape)


if __name__ == "__main__":
    main()
