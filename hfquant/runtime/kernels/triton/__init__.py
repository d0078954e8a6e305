"""Kernels for NVIDIA GPUs, written in Triton.  Nothing here imports triton before a kernel is asked for.

linear     W1..8 · 16-bit floats                       rounded    W1..8 · 8-bit integers
dense      codes -> 16-bit weights, for many rows      tokens     x -> 8-bit integers
attention  one query over a compressed KV cache

launch what runs on the GPU, which is in `device`.  `layout` and `signed` say how they read codes, `configs` which sizes
they run with, by GPU and rows.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from packaging import version

from .. import Unavailable

OLDEST = (3, 7)  # of triton


def interpreted() -> bool:
    """Whether triton was told to run its kernels on the CPU, one operation at a time: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def refuses_device(kind: str, index: int | None) -> str | None:
    """Why nothing here runs on a device; None if it may."""
    if kind != "cuda" and not (kind == "cpu" and interpreted()):
        return f"for NVIDIA GPUs, not {kind}"
    if reason := refuses_triton():
        return reason
    if kind == "cuda":
        if torch.version.hip is not None:
            return "for NVIDIA GPUs, not AMD's"
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return f"compute capability {major}.{minor}: needs 8.0"
    return None


@cache
def refuses_triton() -> str | None:
    """Why the triton that is installed, if any, does not compile these kernels."""
    if find_spec("triton") is None:
        return "triton is not installed: `pip install 'hfquant[gpu]'`"
    import triton

    if version.parse(triton.__version__).release < OLDEST:
        return f"triton {triton.__version__} is too old: needs {'.'.join(map(str, OLDEST))}"
    return None


@contextmanager
def launching(device: torch.device) -> Iterator[None]:
    """Raises Unavailable for what triton cannot compile or launch here."""
    from triton.errors import TritonError

    _works(device)
    try:
        yield
    except TritonError as error:
        raise Unavailable(f"triton: {error}") from error


@cache
def _works(device: torch.device) -> None:
    """Run a kernel that does next to nothing.  Raises Unavailable where triton, its driver or compiler fails."""
    try:
        from .probe import touch

        touch(device)
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"triton does not run on {device}: {error}") from error
