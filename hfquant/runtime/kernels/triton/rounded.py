"""Launches the kernel of `device.integers`: a layer whose input is rounded too."""

import torch
from torch import Tensor

from . import counters
from .configs import Config, choose, gpu
from .device import integers
from .device.fields import INTERPRETED
from .signed import Integers
from .tokens import Rounded

BAND = 8  # blocks of rows that follow each other


def rounded(
    x: Rounded,
    W: Integers,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    config: Config | None = None,
    join: str = "last",
    asm: bool = True,
) -> Tensor:
    """[rows, out] in `dtype`.  x: its codes have `W.columns` columns.  bias [out].  join, asm: as in `linear`."""
    rows, (outs, _) = x.codes.shape[0], W.shape
    # where nothing changes between them, units may be longer
    unit = W.unit if not W.whole or W.nibbles else 256 if rows <= 16 else 128
    if config is None:
        kernel = "nibbles" if W.nibbles else "bytes"
        config = choose(gpu(x.codes.device), kernel, 4 if W.nibbles else 8, rows, W.shape, W.columns // unit)
    y = torch.empty(rows, outs, dtype=dtype, device=x.codes.device)
    padded = W.codes.shape[0]
    tiles = -(-outs // config.outs), -(-rows // config.rows)
    stride = x.scale.stride(0) if x.scale.shape[0] > 1 else 0
    sums = torch.int32 if W.whole else torch.float32
    partial, count, join = counters.meeting(
        x.codes.device, sums, config.split, tiles[0] * tiles[1], (rows, padded), join
    )
    sizes = {"SPAN": W.span, "ROWS": config.rows, "OUTS": config.outs}
    integers.rounded[(tiles[0] * tiles[1], config.split)](
        x.codes,
        x.scale,
        x.zero,
        W.codes,
        W.scale,
        W.zero,
        W.sums,
        y,
        bias,
        partial,
        count,
        rows,
        outs,
        padded,
        W.columns,
        stride,
        W.scale.shape[0],
        x.scale.shape[1],
        GROUP=W.group,
        UNIT=unit,
        NIBBLES=W.nibbles,
        BAND=BAND,
        SPLIT=config.split,
        JOIN=join,
        ASM=asm and not INTERPRETED.value,
        **sizes,
        **config.options,
    )
    if config.split > 1 and join != "last":
        integers.join_rounded[tiles](
            partial,
            x.scale,
            x.zero,
            W.scale,
            W.sums,
            y,
            bias,
            rows,
            outs,
            padded,
            stride,
            WHOLE=W.whole,
            NIBBLES=W.nibbles,
            SPLIT=1 if join == "atomic" else config.split,
            **sizes,
            **config.options,
        )
    return y
