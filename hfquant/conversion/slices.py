"""One block of a model, rounded onto a recipe's grids: a first look that takes seconds.

For where a GPU is lent for no longer than that.  The weights are read by ranges of the Hub's files, and nothing of the
model is run: what is worked on are numbers, whoever they are from.  Its inputs are not known either, so every weight
goes to the nearest value of its grid; a calibrated method chooses by the inputs, and a conversion measures the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LimitError, RecipeError, SourceError
from ..model.headers import DTYPES
from ..model.remote import Look, Tensors, Token, read_tensors
from ..tensors.grid import Grid
from .retry import insisting

MOST = 600_000_000  # bytes of weights that are fetched: a block of a model with 8 billion parameters has 440 million
SEARCH = 40  # narrower ranges that are tried for each group, as `rtn` does


@dataclass(frozen=True)
class Piece:
    """A weight as it is stored.  kind: of safetensors; transposed: [in, out], as GPT-2 has it.  Plain, to be sent."""

    name: str
    kind: str
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
    seen: Look, tensors: Tensors, middle: Sequence[Mapping[str, Any]], token: Token, most: int = MOST
) -> list[Piece]:
    """The weights of a block.  middle: which, as the planner's answer has them.

    Raises RecipeError where the recipe rounds none of it, LimitError for a block that is too large, SourceError where
    its files name its weights otherwise than transformers does.
    """
    if not middle:
        raise RecipeError("this recipe rounds no matrix of a block", "choose one that does, such as `gptq-w4g64`")
    known = {one["name"]: one for one in middle if len(tensors.get(one["name"], ("", ()))[1]) == 2}
    if not known:
        raise SourceError(f"the files of {seen.model} name its blocks' weights otherwise", "start the conversion")
    needed = sum(_bytes(*tensors[name]) for name in known)
    if needed > most:
        said = f"a block of {seen.model} has {needed / 1e6:,.0f} MB, at most {most / 1e6:,.0f} are looked at here"
        raise LimitError(said, "start the conversion")
    found = insisting(lambda: read_tensors(seen, set(known), token))
    return [
        Piece(name, kind, (shape[0], shape[1]), content, known[name]["grid"], known[name]["kind"] == "conv1d")
        for name, (kind, shape, content) in found.items()
    ]


def rounded(pieces: Sequence[Piece]) -> list[Rounded]:
    """What the grids make of the weights, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad(), torch.device(device):  # what a grid makes beside the weights is made there too
        return [_rounded(piece, device) for piece in pieces]


def _rounded(piece: Piece, device: str) -> Rounded:
    """In float32, with scales in float16."""
    stored = torch.frombuffer(bytearray(piece.content), dtype=DTYPES[piece.kind]).view(piece.shape)
    W = stored.to(device).float()
    W = W.T.contiguous() if piece.transposed else W
    grid = Grid(**piece.grid)
    scale, zero = grid.fit(W, search=SEARCH)
    Q = grid.decode(grid.encode(W, scale, zero), scale, zero)
    error = (W - Q).norm() / W.norm().clamp(min=torch.finfo(torch.float32).tiny)
    return Rounded(piece.name, (W.shape[0], W.shape[1]), str(grid), float(error))


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    return DTYPES[kind].itemsize * torch.Size(shape).numel()
