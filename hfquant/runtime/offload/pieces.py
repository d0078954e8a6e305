"""Where the bytes of every parameter lie, so that a block can be read straight into memory that is already there."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.skeleton import Skeleton
from .reader import Handle
from .scratch import Files, Scratch, write_all

ALIGN = 64  # matrix products may round otherwise where memory is not aligned


@dataclass(frozen=True)
class Piece:
    """One parameter, and where it lies in a file.

    dtype: what it is computed with, and so kept in memory as.  stored: what the file holds, the same or narrower.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Handle
    offset: int
    stored: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.stored.itemsize

    def view(self, room: Tensor) -> Tensor:
        """The parameter over uint8 memory of `nbytes` bytes."""
        return room.view(self.dtype).view(self.shape)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def room(nbytes: int, pinned: bool = False) -> Tensor:
    """uint8 [nbytes], aligned"""
    raw = torch.empty(nbytes + ALIGN, dtype=torch.uint8, pin_memory=pinned)
    start = -raw.data_ptr() % ALIGN
    return raw[start : start + nbytes]


def footprint(pieces: Sequence[Piece]) -> int:
    """Bytes of memory that these take side by side."""
    return sum(aligned(p.nbytes) for p in pieces)


@torch.no_grad()
def collect(skeleton: Skeleton, prefix: str, files: Files, scratch: Scratch) -> list[Piece]:
    """The pieces of one block.

    What the checkpoint stores as the module computes with it, or in a narrower type, is read where it lies.  The rest
    (wider types, experts stored one by one) is converted once, block by block, into a temporary file.
    """
    names = [name for name in skeleton.names_under(prefix) if not _is_buffer(skeleton, name)]
    direct = [_direct(skeleton, name, files) for name in names]
    found = [piece for piece in direct if piece is not None]
    others = [name for name, piece in zip(names, direct, strict=True) if piece is None]
    if not others:
        return found
    skeleton.load(others)
    types = {skeleton.source.tensors[s].dtype for name in others for s in skeleton.stored[name]}
    block, have = skeleton.model.get_submodule(prefix), {piece.name for piece in found}
    made = {f"{prefix}.{n}": p.detach() for n, p in block.named_parameters() if f"{prefix}.{n}" not in have}
    found += _stage({name: p for name, p in made.items() if not p.is_meta}, types, scratch)
    skeleton.drop(made)
    return found


def _is_buffer(skeleton: Skeleton, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf in skeleton.model.get_submodule(module)._buffers


def _direct(skeleton: Skeleton, name: str, files: Files) -> Piece | None:
    """The piece in the checkpoint's own file, None if its bytes are not the parameter's."""
    parameter, stored = skeleton.model.get_parameter(name), skeleton.stored[name]
    info = skeleton.source.tensors[stored[0]]
    if name in skeleton.converted or len(stored) > 1 or not _widens(info.dtype, parameter.dtype):
        return None
    return Piece(name, parameter.dtype, tuple(parameter.shape), files.handle(info.file), info.offset, info.dtype)


def _widens(stored: torch.dtype, computed: torch.dtype) -> bool:
    """Whether every value of one type is one of the other."""
    if stored == computed:
        return True
    return stored.is_floating_point and computed.is_floating_point and torch.promote_types(stored, computed) == computed


def _stage(tensors: dict[str, Tensor], types: Collection[torch.dtype], scratch: Scratch) -> list[Piece]:
    """Write parameters one behind the other into a temporary file, as narrow as they were stored if that is exact."""
    narrow = {name: _narrowed(tensor, types) for name, tensor in tensors.items()}
    file, at, found = scratch.file(sum(aligned(t.nbytes) for t in narrow.values())), 0, []
    for name, tensor in narrow.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            write_all(file.fd, at, raw)
        except OSError as error:
            raise scratch.refused(error, tensor.nbytes) from error
        found.append(Piece(name, tensors[name].dtype, tuple(tensor.shape), file, at, tensor.dtype))
        at += aligned(tensor.nbytes)
    return found


def _narrowed(tensor: Tensor, types: Collection[torch.dtype]) -> Tensor:
    """The same values in a narrower type that they came from, if they are."""
    for dtype in types:
        if dtype.itemsize < tensor.dtype.itemsize and _widens(dtype, tensor.dtype):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.to(tensor.dtype), tensor):
                return narrow
    return tensor
