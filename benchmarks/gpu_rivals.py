"""Other people's kernels, where they are installed: gemlite and Humming, 4 bit in groups of 128, x in bfloat16.

    pip install gemlite humming-kernels

What their packages (gemlite 0.6, humming-kernels 0.1.19) say is how they are called; on a GPU it was never run.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BITS, GROUP, TOLERANCE = 4, 128, 0.02
Run = Callable[[Tensor], Tensor]
Make = Callable[[int, int, int], tuple[Run, float]]


def rivals() -> tuple[dict[str, Make], dict[str, str]]:
    """make(out, in, seed) -> what runs, and the bytes of its weight, by name; and why others are left out."""
    found: dict[str, Make] = {}
    missing: dict[str, str] = {}
    for name, package, make in (("gemlite W4A16", "gemlite", _gemlite), ("Humming W4A16", "humming.layer", _humming)):
        try:
            importlib.import_module(package)
            found[name] = make
        except (ImportError, RuntimeError) as error:  # some look for a GPU or a compiler when they are imported
            missing[name] = f"not installed: {error}" if isinstance(error, ImportError) else str(error)
    return found, missing


def _weights(out: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [out, in] and scales bfloat16 [out, groups], the same for every rival."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**BITS, (out, columns), generator=draw, dtype=torch.uint8)
    return codes, (torch.rand(out, columns // GROUP, generator=draw) * 0.01 + 0.001).bfloat16()


def _dense(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [out, in]"""
    return (codes.float() - 2 ** (BITS - 1)) * scale.float().repeat_interleave(GROUP, 1)


def _gemlite(out: int, columns: int, seed: int) -> tuple[Run, float]:
    core: Any = importlib.import_module("gemlite.core")
    codes, scale = _weights(out, columns, seed)
    kind = core.DType.BF16
    layer = core.GemLiteLinear(
        BITS, group_size=GROUP, in_features=columns, out_features=out, input_dtype=kind, output_dtype=kind
    )
    zeros = torch.full_like(scale, 2 ** (BITS - 1))
    layer.pack(codes.cuda(), scale.cuda(), zeros.cuda(), None)
    if seed == 0:
        check("gemlite", layer, _dense(codes, scale))
    return layer, out * columns * BITS / 8 + scale.nbytes


def _humming(out: int, columns: int, seed: int) -> tuple[Run, float]:
    humming: Any = importlib.import_module("humming.layer")
    codes, scale = _weights(out, columns, seed)
    W = _dense(codes, scale)
    layer = humming.HummingLayer(
        shape_n=out, shape_k=columns, weight_config={"dtype": f"uint{BITS}", "group_size": GROUP},
        torch_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    layer.load_from_unquantized(W.cuda())
    layer.transform()
    if seed == 0:
        check("Humming", layer, W, 0.15)  # it rounds W once more, to a grid of its own
    return layer, out * columns * BITS / 8 + scale.nbytes


def check(name: str, run: Run, W: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises AssertionError if it is not x Wᵀ."""
    x = torch.randn(5, W.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ W.double().T
    off = float((run(x.cuda()).cpu().double() - exact).norm() / exact.norm())
    assert off < tolerance, f"{name} is wrong: {off}"
