"""One block of a model, rounded onto a recipe's grids: a first look that takes seconds.

For where a GPU is lent for no longer than that.  The weights are read by ranges of the Hub's files, and nothing of the
model is run: what is worked on are numbers, whoever they are from.  Its inputs are not known either, so every weight
goes to the nearest value of its grid; a calibrated method chooses by the inputs, and a conversion measures the result.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LimitError, RecipeError, SourceError
from ..methods import rtn
from ..model.headers import DTYPES
from ..model.remote import OTHER_COPY, Look, Tensors, Token, read_tensors
from ..tensors.grid import Grid
from .retry import insisting

MOST = 600_000_000  # bytes of weights that are fetched: a block of a model with 8 billion parameters has 440 million
FETCHING = 120.0  # seconds until they have to be here: whoever comes next waits that long at most


@dataclass(frozen=True)
class Piece:
    """A weight as it is stored.  dtype: of safetensors; transposed: [in, out], as GPT-2 has it.  Plain, to be sent."""

    name: str
    dtype: str
    shape: tuple[int, int]
    content: bytes
    grid: Mapping[str, Any]
    transposed: bool


@dataclass(frozen=True)
class Rounded:
    """What rounding did to a weight W.  error: ‖W − Q‖ / ‖W‖.  shape: [out, in]."""

    name: str
    shape: tuple[int, int]
    grid: str
    error: float


def fetch(
    seen: Look,
    tensors: Tensors,
    middle: Sequence[Mapping[str, Any]],
    token: Token,
    most: int = MOST,
    until: float = math.inf,
) -> list[Piece]:
    """The weights of a block.  middle: which, as the planner's answer has them.

    most: bytes.  until: by `time.monotonic()`, when they have to be here.

    Raises RecipeError where the recipe rounds none of it, LimitError for a block that is too large, SourceError where
    its files name its weights otherwise than transformers does, hold them otherwise than their headers say, or do not
    arrive in time.
    """
    if not middle:
        raise RecipeError("this recipe rounds no matrix of a block", "choose one that does, such as `gptq-w4g64`")
    known = {one["name"]: one for one in middle}
    _check_names(seen, known, tensors)
    needed = sum(_bytes(*tensors[name]) for name in known)
    if needed > most:
        said = f"a block of {seen.model} has {needed / 1e6:,.0f} MB, at most {most / 1e6:,.0f} are looked at here"
        raise LimitError(said, "start the conversion")
    found = insisting(lambda: read_tensors(seen, set(known), token, most=most, until=until), until)
    if wrong := [name for name in known if name not in found or found[name][:2] != tensors[name]]:
        raise SourceError(f"{wrong[0]} of {seen.model} is empty, or is in its files twice", OTHER_COPY)
    return [
        Piece(name, dtype, (shape[0], shape[1]), content, known[name]["grid"], known[name]["kind"] == "conv1d")
        for name, (dtype, shape, content) in found.items()
    ]


def _check_names(seen: Look, names: Collection[str], tensors: Tensors) -> None:
    """Raises SourceError unless the files have a matrix by each of these names, in a type that torch has."""
    if missing := [name for name in names if name not in tensors]:
        said = f"the files of {seen.model} name its blocks' weights otherwise: they have no {missing[0]}"
        raise SourceError(said, "start the conversion")
    for name in names:
        dtype, shape = tensors[name]
        if dtype not in DTYPES or len(shape) != 2:
            raise SourceError(f"{name} of {seen.model} is no matrix of numbers: {list(shape)} of {dtype}", OTHER_COPY)


def rounded(pieces: Sequence[Piece]) -> list[Rounded]:
    """What the grids make of the weights, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad(), torch.device(device):  # what a grid makes beside the weights is made there too
        return [_rounded(piece, device) for piece in pieces]


def _rounded(piece: Piece, device: str) -> Rounded:
    """In float32, with scales in float16."""
    stored = torch.frombuffer(bytearray(piece.content), dtype=DTYPES[piece.dtype]).view(piece.shape)
    W = stored.to(device).float()
    W = W.T.contiguous() if piece.transposed else W
    grid = Grid(**piece.grid)
    scale, zero = grid.fit(W, search=rtn.Method().search)
    Q = grid.decode(grid.encode(W, scale, zero), scale, zero)
    error = (W - Q).norm() / W.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return Rounded(piece.name, (W.shape[0], W.shape[1]), str(grid), float(error))


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPES[dtype].itemsize * math.prod(shape)
