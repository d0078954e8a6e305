"""The tensors of a rotated model, computed from the original's as they are read.  The equations are the package's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...tensors.hadamard import Rotation
from ..headers import TensorInfo
from ..rewritten import Derived, Rewritten
from ..skeleton import Skeleton
from .structure import Matrix, StreamNorm, Structure, refuse

CONSTANT = 0.25  # the bias that a LayerNorm keeps in all channels: small beside what it puts out

Make = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Edits:
    """skeleton: of the original.  source: the original with a head of its own."""

    skeleton: Skeleton
    source: Rewritten
    structure: Structure
    Q: Rotation

    def tensors(self) -> dict[str, TensorInfo]:
        """By their stored names, all that change."""
        found: dict[str, TensorInfo] = {}
        for parameter in self.structure.tables:
            found |= self._by_rows(parameter, self._written)
        for matrix in self.structure.writers:
            found |= self._writer(matrix)
        for norm in self.structure.norms:
            found |= dict(self._norm(norm))
        return found

    def _stored(self, parameter: str) -> list[str]:
        """Names of the tensors that fill a parameter; a head without one has the table's."""
        return self.skeleton.stored.get(parameter) or [parameter]

    def _read(self, parameter: str) -> Tensor:
        return self.source.tensors[self._stored(parameter)[0]].load(torch.float32)

    def _by_rows(self, parameter: str, change: Callable[[Tensor], Tensor]) -> dict[str, TensorInfo]:
        """A parameter whose rows along the last axis each change by themselves."""

        def make(info: TensorInfo) -> Make:
            return lambda begin, end: change(_rows(info, begin, end))

        return self._derived(parameter, make)

    def _whole(self, parameter: str, change: Callable[[Tensor], Tensor]) -> dict[str, TensorInfo]:
        def make(info: TensorInfo) -> Make:
            return lambda begin, end: change(info.load(torch.float32))[begin:end]

        return self._derived(parameter, make)

    def _across(self, matrix: Matrix, change: Callable[[Tensor], Tensor], *, reads: bool) -> dict[str, TensorInfo]:
        """Change a matrix along its inputs (reads), or else along its outputs."""
        if matrix.transposed != reads:
            return self._by_rows(matrix.parameter, change)
        return self._whole(matrix.parameter, lambda W: change(W.mT).mT.contiguous())

    def _derived(self, parameter: str, make: Callable[[TensorInfo], Make]) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for name in self._stored(parameter):
            info = self.source.tensors[name]
            found[name] = Derived(info.file, info.offset, info.dtype, info.shape, make(info))
        return found

    def _written(self, y: Tensor) -> Tensor:
        """What goes into the stream, in the other basis.  [.., width]"""
        return self.Q(y - y.mean(-1, keepdim=True) if self.structure.centered else y)

    def _writer(self, matrix: Matrix) -> dict[str, TensorInfo]:
        found = self._across(matrix, self._written, reads=False)
        return found if matrix.bias is None else found | self._whole(matrix.bias, self._written)

    def _norm(self, norm: StreamNorm) -> Iterator[tuple[str, TensorInfo]]:
        gain = self._read(f"{norm.module}.weight") + norm.offset
        beta = self._read(f"{norm.module}.bias") if norm.bias else None
        moved = beta is not None and all(matrix.bias is not None for matrix in norm.readers)
        if beta is not None and not moved and not norm.centers:
            raise refuse(
                self.skeleton, f"`{norm.module}` adds a bias, and not all layers that read it have one to take that"
            )
        constant = 0.0 if beta is None or moved else CONSTANT
        yield from self._constant(f"{norm.module}.weight", 1 - norm.offset).items()
        if beta is not None:
            yield from self._constant(f"{norm.module}.bias", constant).items()
        for matrix in norm.readers:
            yield from self._reader(matrix, gain, beta, constant, norm.centers).items()

    def _reader(
        self, matrix: Matrix, gain: Tensor, beta: Tensor | None, constant: float, centers: bool
    ) -> dict[str, TensorInfo]:
        def turned(W: Tensor) -> Tensor:
            new = self.Q(W * gain)
            if centers:
                new = new - new.mean(-1, keepdim=True)
            if beta is not None and constant:
                new = new + (W @ beta)[..., None] / (constant * len(beta))
            return new

        found = self._across(matrix, turned, reads=True)
        if beta is not None and not constant and matrix.bias is not None:
            W = self.source.tensors[self._stored(matrix.parameter)[0]]

            def shifted(b: Tensor) -> Tensor:
                w = W.load(torch.float32)
                return b + (w.mT if matrix.transposed else w) @ beta

            found |= self._whole(matrix.bias, shifted)
        return found

    def _constant(self, parameter: str, value: float) -> dict[str, TensorInfo]:
        return self._whole(parameter, lambda old: torch.full_like(old, value))


def _rows(info: TensorInfo, begin: int, end: int) -> Tensor:
    """float32 [end - begin, ...]"""
    width = torch.Size(info.shape[1:]).numel()
    return info.read(begin * width, (end - begin) * width).view(end - begin, *info.shape[1:]).float()
