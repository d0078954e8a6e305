"""What the kernels of generated machine code have in common."""

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...tensors.activations import dynamic_scale, fake_quantize
from ...tensors.encoding import Activations
from ...tensors.formats import Extras
from ..extras import before, rounding
from ..reference import Matrix
from . import Bound, Unavailable

if TYPE_CHECKING:
    from ...llvm.machine import Level
    from ..llvm.call import Plan
    from ..llvm.layout import Tiled

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(x: Tensor, matrix: Matrix, activations: Activations | None, real: bool) -> str | None:
    """Why tiles do not take this."""
    if reason := unfit(x, matrix):
        return reason
    from ..llvm import layout

    runs = layout.Preparation.of(matrix.encoding.grid, matrix.shape[1], activations, real).runs
    if runs.padded > max(layout.WASTE * matrix.shape[1], 64):
        return f"groups this small would be padded to {runs.padded} columns"
    return None


def unfit(x: Tensor, matrix: Matrix) -> str | None:
    """Why generated code does not take this."""
    if x.device.type != "cpu" or matrix.device.type != "cpu":
        return f"for CPUs, not {x.device.type}"
    if not 2 <= matrix.encoding.grid.bits <= 8:
        return f"for weights of 2 to 8 bit, not {matrix.encoding.grid.bits}"
    if x.dtype not in TYPES:
        return f"for inputs of 32 or 16 bits, not {x.dtype}"
    if not matrix.trackable:
        return "weights made under torch.inference_mode: a change of them could not be noticed"
    return missing()


def missing() -> str | None:
    """Why nothing can be generated on this machine."""
    try:
        from ...llvm import machine

        return "this processor has no AVX2" if machine.level() is None else None
    except ImportError as error:
        return f"needs llvmlite: `pip install 'hfquant[cpu]'` ({error})"


def bind(x: Tensor, matrix: Matrix, activations: Activations | None, real: bool) -> "Bound | None":
    """The layer for inputs of this shape and type, if nothing has to be done around the generated code."""
    weight = tiled(matrix, activations, real)
    if weight.inner is not None or (activations is not None and activations.per == "tensor"):
        return None
    return plan()(weight, x.shape, x.dtype)


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None, activations: Activations | None, real: bool) -> Tensor:
    """[rows, out]"""
    weight = tiled(matrix, activations, real)
    inner = static = None
    if activations is not None and activations.per == "tensor":
        static = _whole(x, matrix, activations)
    if weight.inner is not None:
        v, s = weight.inner
        inner = torch.nn.functional.linear(_seen(x, matrix, activations), v).mul_(s)
    if bias is not None and bias.dtype not in TYPES:
        bias = bias.float()
    return plan()(weight, x.shape, x.dtype)(x, bias, inner, static)


@cache
def plan() -> "type[Plan]":
    """`llvm.call.Plan`, imported when there is something to multiply."""
    from ..llvm.call import Plan

    return Plan


def tiled(matrix: Matrix, activations: Activations | None, real: bool) -> "Tiled":
    """The weight in tiles; made when first asked for.  Raises Unavailable if that fails."""
    found: Tiled = matrix.derive(REAL if real else INTEGER, lambda: _made(matrix, activations, real))
    return found


TILES, REAL, INTEGER = "tiles", "tiles as x is", "tiles for integers"


def _made(matrix: Matrix, activations: Activations | None, real: bool) -> "Tiled":
    from ..llvm import layout

    level = prepared()
    how = layout.Preparation.of(matrix.encoding.grid, matrix.shape[1], activations, real)
    try:
        held = matrix.derive(TILES, lambda: layout.Tiles(matrix.quantized().filled, level, how))
        return layout.Tiled(held, how)
    except (RuntimeError, OSError) as error:
        raise Unavailable(f"its code could not be made: {str(error).splitlines()[0]}") from error


@cache
def prepared() -> "Level":
    """This machine's instructions; from the first call on packed codes are unpacked with them too."""
    from ...llvm import machine
    from ..llvm import fast

    level = machine.level()
    assert level is not None
    fast.accelerate(level)
    return level


def _whole(x: Tensor, matrix: Matrix, activations: Activations) -> tuple[Tensor, Tensor]:
    """Scale and zero point of all rows."""
    extras = matrix.extras
    rows = x.float() if extras.input_scale is None else x.float() / extras.input_scale
    return dynamic_scale(rows, activations)


def _seen(x: Tensor, matrix: Matrix, activations: Activations | None) -> Tensor:
    """What the low-rank factors multiply, float32."""
    if activations is None:
        return before(x.float(), matrix)
    extras: Extras = matrix.extras
    rows = x.float() if extras.input_scale is None else x.float() / extras.input_scale
    return fake_quantize(rows, activations, *rounding(rows, extras))
