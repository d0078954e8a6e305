"""Launches the kernel of `device.dense`: the weight itself, which many rows are multiplied with, by cuBLAS."""

import torch
from torch import Tensor

from .configs import options
from .device.dense import decode
from .device.fields import INTERPRETED
from .layout import Weights

OUTS = 32


def dense(W: Weights, dtype: torch.dtype, asm: bool = True) -> Tensor:
    """The weight [out, in] in bfloat16 or float16."""
    outs, in_features = W.shape
    w = torch.empty(outs, in_features, dtype=dtype, device=W.words.device)
    steps = W.layout.columns(in_features) // W.layout.step
    decode[(steps, -(-outs // OUTS))](
        W.words,
        W.scale,
        W.zero,
        w,
        outs,
        W.words.shape[0],
        in_features,
        steps,
        BITS=W.layout.bits,
        FIELD=W.layout.field,
        UNIT=W.layout.unit,
        GROUP=W.group,
        OUTS=OUTS,
        ASM=asm and not INTERPRETED.value,
        **options(),
    )
    return w
