"""Machine code on x86 CPUs, generated through llvmlite when it is first needed.

    machine   which instructions there are
    ir        the small language the generators are written in
    numbers   16 and 32 bits
    engine    compiling, and keeping what was compiled on disk
    threads   OpenMP as torch has loaded it
    strips    work on matrices of float32, 16 columns at a time

What is generated stands beside what it is for: `runtime.llvm` multiplies, `tensors._search`, `methods._columns`,
`methods._products` and `methods._descent` are the inner loops of compression.
"""

import os

from torch import Tensor

BROKEN: list[str] = []  # why no more loops are generated in this process


def refused(*tensors: Tensor | None) -> str | None:
    """Why generated loops (`strips`) do not take these tensors here; None if they do.

    HFQUANT_KERNELS=reference switches them off.
    """
    if os.environ.get("HFQUANT_KERNELS") == "reference":
        return "switched off"
    if any(t is not None and (t.device.type != "cpu" or type(t) is not Tensor) for t in tensors):
        return "for ordinary tensors on a CPU"
    if BROKEN:
        return BROKEN[0]
    try:
        from . import machine

        return "this processor has no AVX2" if machine.level() is None else None
    except ImportError as error:
        return f"needs llvmlite: `pip install 'hfquant[cpu]'` ({error})"
