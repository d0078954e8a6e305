"""Low-bit layers on this machine's CPU against dense ones, torch's own 4-bit kernel and ONNX Runtime's.

    python benchmarks/kernels_cpu.py [--quick] [--shapes 4096x4096,...] [--rows 1,16,128]

All candidates for a shape and a number of rows run in turns, several rounds in one process, each over as many copies of
the weight as no cache holds.  What counts is the processor time of the thread, and of each candidate the fastest round:
a busy machine makes rounds slower, never faster.  Compare within a line; the machine differs between lines.

`onnxruntime` and `onnx` are measured beside the others where they are installed.  Correctness is checked before
anything is timed.  Writes results/kernels_cpu.json and results/kernels_cpu.md next to this file.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reporting import write
from torch import Tensor

from hfquant.llvm import machine
from hfquant.machine import hardware, versions
from hfquant.runtime import kernels
from hfquant.runtime.nn import QLinear
from hfquant.tensors import formats
from hfquant.tensors.encoding import Activations
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized

RESULTS = Path(__file__).parent / "results"
COLD = 96e6  # bytes that no cache holds
Run = Callable[[Tensor], Tensor]


def quantized(out: int, columns: int, grid: Grid, activations: Activations | None, seed: int) -> Quantized:
    """A random weight: drawn as codes, as its values do not matter for speed."""
    draw = torch.Generator().manual_seed(seed)
    groups = grid.groups(columns)
    zero = torch.full((out, groups), grid.middle, dtype=torch.uint8)
    if not grid.symmetric:
        zero = torch.randint(0, grid.top + 1, (out, groups), generator=draw, dtype=torch.uint8)
    return Quantized(
        codes=torch.randint(0, grid.top + 1, (out, columns), generator=draw, dtype=torch.uint8),
        scale=(torch.rand(out, groups, generator=draw) * 0.01 + 0.001).half(),
        zero_point=zero,
        grid=grid,
        activations=activations,
    )


@dataclass(frozen=True)
class Candidate:
    """make(out, in, seed) -> what runs, and the bytes of its weight; kernels: the mode under which it runs."""

    make: Callable[[int, int, int], tuple[Run, float]]
    kernels: str = "auto"


def candidates(dtype: torch.dtype, rows: int, quick: bool) -> dict[str, Candidate]:
    """What can be compared for so many rows, by name."""
    found = {
        "bf16": Candidate(partial(_dense, torch.bfloat16)),
        "f32": Candidate(partial(_dense, torch.float32)),
    }
    widths = (4, 8) if quick else range(2, 9)
    for bits in widths:
        found[f"W{bits}A8"] = _ours(Grid(bits, 64), None, "cpu_int8", dtype)
    found["W4A8 asym"] = _ours(Grid(4, 64, False), None, "cpu_int8", dtype)
    found["W8A8 token"] = _ours(Grid(8, -1), Activations(8, "token"), "cpu_rounded", dtype)
    found["W4 exact"] = _ours(Grid(4, 64), None, "exact", torch.float32)
    if rows <= 64:
        found["torch int4pack"] = _ours(Grid(4, 64), None, "int4pack", torch.bfloat16)
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return found
    for bits in (4, 8):
        found[f"ORT W{bits}"] = Candidate(partial(_onnx, bits))
    return found


def _dense(dtype: torch.dtype, out: int, columns: int, seed: int) -> tuple[Run, float]:
    W = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return lambda x: F.linear(x.to(dtype), W), W.nbytes


def _ours(grid: Grid, activations: Activations | None, mode: str, dtype: torch.dtype) -> Candidate:
    return Candidate(partial(_layer, grid, activations, mode, dtype), mode)


def _layer(
    grid: Grid, activations: Activations | None, mode: str, dtype: torch.dtype, out: int, columns: int, seed: int
) -> tuple[Run, float]:
    Q = quantized(out, columns, grid, activations, seed)
    layer = QLinear.from_quantized(Q, None, formats.load("native"), dtype)
    size = columns * out * grid.bits / 8 + Q.scale.nbytes + (0 if grid.symmetric else Q.zero_point.nbytes)
    x = torch.randn(2, columns).to(dtype)
    with kernels.mode(mode):
        y, exact = layer(x).double(), x.double() @ Q.dequantize().double().T
    assert (y - exact).norm() < 0.03 * exact.norm(), f"{mode} is wrong: {(y - exact).norm() / exact.norm()}"
    return lambda x: layer(x.to(dtype)), size


def _onnx(bits: int, out: int, columns: int, seed: int) -> tuple[Run, float]:
    import numpy as np
    import onnx
    import onnxruntime as ort

    draw, block = np.random.default_rng(seed), 64
    blob = draw.integers(0, 256, (out, columns // block, block * bits // 8), dtype=np.uint8)
    scales = draw.random(out * columns // block).astype(np.float32) * 0.01
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=columns, N=out, bits=bits, block_size=block, accuracy_level=4,
    )  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", onnx.TensorProto.FLOAT, [None, columns])],
        [value("y", onnx.TensorProto.FLOAT, [None, out])],
        [onnx.numpy_helper.from_array(blob, "w"), onnx.numpy_helper.from_array(scales, "s")],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.float().numpy()})[0], blob.nbytes + scales.nbytes


def measure(out: int, columns: int, rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a call, of every candidate, and what share of the fastest reading each reached."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(args.dtype)
    runs: dict[str, tuple[list[Run], float]] = {}
    chosen = candidates(args.dtype, rows, args.quick)
    for name, candidate in chosen.items():
        first, size = candidate.make(out, columns, 0)
        copies = 1 if rows > 16 else max(1, min(args.copies, int(COLD / size)))
        runs[name] = [first, *(candidate.make(out, columns, seed)[0] for seed in range(1, copies))], size
    best = dict.fromkeys(runs, float("inf"))
    with torch.no_grad():
        for turn in range(args.rounds + 1):
            for name, (copies_, _) in runs.items():
                with kernels.mode(chosen[name].kernels):
                    began = time.thread_time()
                    for run in copies_:
                        run(x)
                    seconds = (time.thread_time() - began) / len(copies_)
                if turn:
                    best[name] = min(best[name], seconds)
    row: dict[str, Any] = {"shape": f"{out}x{columns}", "rows": rows, "seconds": best}
    row["ratio_to_bf16"] = {name: best["bf16"] / seconds for name, seconds in best.items()}
    row["ratio_to_f32"] = {name: best["f32"] / seconds for name, seconds in best.items()}
    row["bytes_per_second"] = {name: size / best[name] for name, (_, size) in runs.items()}
    row["flops"] = {name: 2 * rows * out * columns / seconds for name, seconds in best.items()}
    return row


def reading() -> float:
    """Bytes a second that one thread reads from memory."""
    memory = torch.zeros(int(COLD) * 2, dtype=torch.uint8).view(torch.int64)
    best = float("inf")
    for _ in range(8):
        began = time.thread_time()
        memory.sum()
        best = min(best, time.thread_time() - began)
    return memory.nbytes / best


def table(document: dict[str, Any]) -> str:
    settings, host = document["settings"], document["hardware"]
    lines = [
        "# CPU kernels: times as fast as bfloat16 `nn.Linear` (and as float32), in one run",
        "",
        f"{host['processor']}, instructions `{settings['level']}`, torch {document['versions']['torch']}, one thread; "
        f"x is {settings['dtype']}.  Processor time, best of {settings['rounds']} interleaved rounds; decode over "
        f"weights that no cache holds.  Reading memory: {document['reading'] / 1e9:.1f} GB/s; load "
        f"{settings['load']:.1f} at the start.  Weights in groups of 64, symmetric unless it says asym; `exact` does "
        "not round x, which is float32 there; `token`: W8A8 with one scale for each token and row.",
    ]
    names = list(dict.fromkeys(name for row in document["rows"] for name in row["seconds"]))
    lines += ["", "| kernel | " + " | ".join(f"{r['shape']}, {r['rows']} rows" for r in document["rows"]) + " |"]
    lines += ["|---" * (1 + len(document["rows"])) + "|"]
    for name in names:
        cells = []
        for row in document["rows"]:
            if name not in row["seconds"]:
                cells.append("")
                continue
            speed = f"{row['bytes_per_second'][name] / 1e9:.1f} GB/s" if row["rows"] == 1 else (
                f"{row['flops'][name] / 1e9:.0f} GF/s"
            )  # fmt: skip
            cells.append(f"{row['ratio_to_bf16'][name]:.1f} ({row['ratio_to_f32'][name]:.1f}), {speed}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="W4 and W8 only")
    parser.add_argument("--shapes", default="1536x576,4096x4096,11008x4096", help="out x in")
    parser.add_argument("--rows", default="1,16,128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=12, help="of a weight, at most")
    parser.add_argument("--dtype", default="bfloat16", type=lambda name: getattr(torch, name))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    level = machine.level()
    document: dict[str, Any] = {
        "hardware": hardware(),
        "versions": versions(),
        "settings": {
            "level": level and level.name,
            "rounds": args.rounds,
            "dtype": str(args.dtype).removeprefix("torch."),
            "load": os.getloadavg()[0],
        },
        "reading": reading(),
        "rows": [],
    }
    for shape in args.shapes.split(","):
        out, columns = map(int, shape.split("x"))
        for rows in map(int, args.rows.split(",")):
            document["rows"].append(measure(out, columns, rows, args))
            print(shape, rows, {n: round(r, 2) for n, r in document["rows"][-1]["ratio_to_bf16"].items()}, flush=True)
            write(args.out / "kernels_cpu", document, table(document))


if __name__ == "__main__":
    main()
