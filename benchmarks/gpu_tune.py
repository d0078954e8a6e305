"""Measures the sizes that the 16-bit kernel runs with on this GPU, for the shapes that are named.

What is fastest goes into the user's cache folder (`configs.remember`), where layers of these shapes find it.
"""

from collections.abc import Callable, Iterator

import torch
from gpu_timing import copies, microseconds
from torch import Tensor

from hfquant.runtime.kernels.triton import configs
from hfquant.runtime.kernels.triton.configs import Config, Gpu
from hfquant.tensors.grid import Grid
from hfquant.tensors.layer import Quantized

OUTS, WARPS, STAGES, SPLITS = (64, 128), (4, 8), (2, 3, 4), (1, 2, 4, 8, 16, 32)


def sizes(gpu: Gpu, bits: int, rows: int, shape: tuple[int, int], steps: int) -> Iterator[Config]:
    """What is tried: the table's choice first, then its neighbours."""
    first = configs.split(configs.shipped(gpu.arch, "planes", bits, rows), gpu, rows, shape[0], steps)
    yield first
    for outs in OUTS:
        for warps in WARPS:
            for stages in STAGES:
                for split in SPLITS:
                    config = Config(first.rows, outs, warps, stages, split)
                    if config != first and split <= max(1, steps // 2):
                        yield config


def fastest(tried: Iterator[Config], time: Callable[[Config], float]) -> tuple[Config, dict[Config, float]]:
    """The best of them, and what each took; those that do not compile or do not fit take forever."""
    taken: dict[Config, float] = {}
    for config in tried:
        try:
            taken[config] = time(config)
        except RuntimeError as error:  # of Triton: out of shared memory, or of registers
            print(f"  {config}: {str(error).splitlines()[0]}")
            taken[config] = float("inf")
    return min(taken, key=lambda config: taken[config]), taken


def tune(gpu: Gpu, grid: Grid, rows: list[int], shape: tuple[int, int]) -> dict[str, Config]:
    """Measure and remember.  Returns what was remembered: the layer's key -> sizes."""
    from hfquant.runtime.kernels.triton.layout import weights
    from hfquant.runtime.kernels.triton.linear import linear

    Ws = [weights(_random(grid, shape, seed)) for seed in range(copies(shape[0] * shape[1] * grid.bits / 8))]
    steps = Ws[0].layout.columns(shape[1]) // Ws[0].layout.step
    found = {}
    for count in rows:
        x = torch.randn(count, shape[1], dtype=torch.bfloat16, device="cuda")

        def time(config: Config, x: Tensor = x) -> float:
            return microseconds(lambda: [linear(x, W, config=config) for W in Ws]) / len(Ws)

        best, taken = fastest(sizes(gpu, grid.bits, count, shape, steps), time)
        found[configs.key("planes", grid.bits, count, shape)] = best
        print(f"{shape[0]}x{shape[1]}, {grid}, {count} rows: {best}, {taken[best]:.1f} us; "
              f"the table's {next(iter(taken.values())):.1f} us", flush=True)  # fmt: skip
    configs.remember(gpu.name, found)
    return found


def _random(grid: Grid, shape: tuple[int, int], seed: int) -> Quantized:
    draw, groups = torch.Generator().manual_seed(seed), grid.groups(shape[1])
    return Quantized(
        codes=torch.randint(0, grid.top + 1, shape, generator=draw, dtype=torch.uint8).cuda(),
        scale=(torch.rand(shape[0], groups, generator=draw) * 0.01 + 0.001).half().cuda(),
        zero_point=torch.full((shape[0], groups), grid.middle, dtype=torch.uint8).cuda(),
        grid=grid,
    )
