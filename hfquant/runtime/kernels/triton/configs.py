"""Which sizes a kernel runs with: a table for each generation of GPUs, and what a user measured on their own.

A table gives, for kernel, width and rows of x, the sizes of a program.  How many programs share the columns of a weight
(`split`) follows from the number of multiprocessors.  `tables/*.json` were chosen by what the compiler makes of them
(no spilled registers, few instructions per weight, room for several programs on a multiprocessor).  What is measured
for one GPU and shape goes into the user's cache folder by `remember`, and is found there before the tables.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ....storage import cache_folder
from ....tensors.shards import write_text

TABLES = Path(__file__).parent / "tables"
MOST_SPLIT = 32


@dataclass(frozen=True)
class Config:
    """rows, outs: what one program computes.  warps, stages: as Triton has them.  split: programs along the columns."""

    rows: int
    outs: int
    warps: int = 4
    stages: int = 3
    split: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return options(self.warps, self.stages)


def options(warps: int = 4, stages: int = 3) -> dict[str, Any]:
    """What triton is told of a launch.  Products and sums are fused, which is its default no longer."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Gpu:
    """What configurations are chosen by."""

    name: str
    arch: int  # 80, 89, 90: the compute capability
    processors: int


@cache
def gpu(device: torch.device) -> Gpu:
    """The interpreter stands for a small Hopper."""
    if device.type != "cuda":
        return Gpu("interpreter", 90, 4)
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, 10 * found.major + found.minor, found.multi_processor_count)


@cache
def table(arch: int) -> dict[str, Any]:
    """The table of the newest generation that is not newer than this one.

    The consumer GPUs after 9.0 have no more shared memory than those before.
    """
    known = sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))
    nearest = 86 if arch // 10 == 12 else max((a for a in known if a <= arch), default=known[0])
    content: dict[str, Any] = json.loads((TABLES / f"sm_{nearest}.json").read_text())
    return content


def shipped(arch: int, kernel: str, bits: int, rows: int) -> Config:
    """The table's sizes, without a split: those for the smallest number of rows that holds these, or the largest."""
    by_rows = next(found for widths, found in table(arch)[kernel].items() if str(bits) in widths.split())
    sizes = sorted(map(int, by_rows))
    size = next((size for size in sizes if size >= rows), sizes[-1])
    return Config(rows=size, **by_rows[str(size)])


def split(config: Config, gpu: Gpu, rows: int, outs: int, steps: int) -> Config:
    """With the columns shared out so that every multiprocessor has two programs, each with two steps at least."""
    programs = -(-rows // config.rows) * -(-outs // config.outs)
    wanted = 2 * gpu.processors // programs
    return replace(config, split=max(1, min(wanted, steps // 2, MOST_SPLIT)))


def choose(gpu: Gpu, kernel: str, bits: int, rows: int, shape: tuple[int, int], steps: int) -> Config:
    """The sizes for a weight [out, in] of so many steps."""
    measured = tuned(gpu.name).get(key(kernel, bits, rows, shape))
    if measured is not None:
        return measured
    return split(shipped(gpu.arch, kernel, bits, rows), gpu, rows, shape[0], steps)


def most_rows(gpu: Gpu) -> int:
    """Rows above which it is faster to make the weight dense, and multiply with that."""
    return int(table(gpu.arch)["most_rows"])


def key(kernel: str, bits: int, rows: int, shape: tuple[int, int]) -> str:
    """What was measured holds for rows up to the next power of two."""
    return f"{kernel} {bits} bit {shape[0]}x{shape[1]}, {1 << max(0, rows - 1).bit_length()} rows"


def tuned_path(name: str) -> Path:
    """Where what was measured on a GPU is kept."""
    return cache_folder() / "kernels" / f"{name.replace(' ', '-').replace('/', '-')}.json"


@cache
def tuned(name: str) -> dict[str, Config]:
    """What was measured on a GPU, nothing if nothing was."""
    path = tuned_path(name)
    if not path.exists():
        return {}
    return {layer: Config(**sizes) for layer, sizes in json.loads(path.read_text()).items()}


def remember(name: str, found: dict[str, Config]) -> Path:
    """Add to what was measured on a GPU; returns the file."""
    path = tuned_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {layer: asdict(config) for layer, config in sorted({**tuned(name), **found}.items())}
    write_text(path, json.dumps(content, indent=1) + "\n")
    tuned.cache_clear()
    return path
