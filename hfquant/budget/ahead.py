"""Σ xxᵀ gathered on the pass forward and kept on disk, so that layers need not be run for it on the way back."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..compress.layout import Layout
from ..compress.portions import ROOM, nbytes
from ..compress.selection import Target
from ..model.blocks import Weight, weights
from .candidates import ENDS
from .moments import Inputs


def targets_of(laid: Layout, name: str, block: nn.Module) -> dict[Weight, Target]:
    """The weights of one block that something is chosen for."""
    found = {w: laid.targets.get(f"{name}.{w.name}") for w in weights(block)}
    return {w: target for w, target in found.items() if target is not None}


def portions(block: nn.Module, found: Sequence[Weight]) -> list[list[Weight]]:
    """Weights whose H, M and the like fit into the room for statistics together."""
    parts: list[list[Weight]] = [[]]
    used = 0
    for weight in found:
        each = 4 * nbytes(weight.shape(block)[1])  # H, its factor, M, and M as products are of
        if parts[-1] and used + each > ROOM:
            parts.append([])
            used = 0
        parts[-1].append(weight)
        used += each
    return parts


def beside(laid: Layout) -> int:
    """Bytes of disk that all sums take, at most: as if no two weights read the same."""
    inside = (target.shape[1] for target in laid.targets.values() if target.kind not in ENDS)
    return sum(4 * n * (n + 1) // 2 for n in inside)


@dataclass
class Ahead:
    """The sums of every block's first portion.  folder: for their files; None: nothing is gathered."""

    laid: Layout
    folder: Path | None
    _leaders: dict[str, dict[Weight, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, laid: Layout, folder: Path, room: int) -> "Ahead":
        """room: bytes that the hidden states take there.  With less than twice of all free, layers are rather run again
        than the disk filled."""
        enough = shutil.disk_usage(folder).free >= 2 * (room + beside(laid))
        return cls(laid, folder if enough else None)

    @contextmanager
    def watching(self, name: str, block: nn.Module, learning: Callable[[], bool]) -> Iterator[None]:
        """Gather, while a block runs.  learning: whether what it is run on is to be learned from."""
        if self.folder is None:
            yield
            return
        inputs = Inputs(block, portions(block, list(targets_of(self.laid, name, block)))[0], learning)
        with inputs.watching():
            yield
        self._leaders[name] = inputs.leaders
        save_file({leader: _packed(H) for leader, H in inputs.H.items()}, self._file(name, self.folder))

    def take(self, name: str, block: nn.Module, portion: Sequence[Weight]) -> Inputs | None:
        """What was gathered of a block, once; None if nothing was."""
        leaders = self._leaders.pop(name, None)
        if leaders is None or self.folder is None:
            return None
        file = self._file(name, self.folder)
        H = {leader: _whole(packed, block, leader) for leader, packed in load_file(file).items()}
        file.unlink()
        return Inputs(block, portion, leaders=leaders, H=H)

    @staticmethod
    def _file(name: str, folder: Path) -> Path:
        return folder / f"{name}.inputs"


def _packed(H: Tensor) -> Tensor:
    """On and below the diagonal, row by row: a mask would take twice the memory of H."""
    n, H = len(H), H.cpu()
    packed = torch.empty(n * (n + 1) // 2)
    for i, at in enumerate(_begins(n)):
        packed[at : at + i + 1] = H[i, : i + 1]
    return packed


def _whole(packed: Tensor, block: nn.Module, leader: str) -> Tensor:
    n = int((2 * packed.numel()) ** 0.5)  # n(n + 1)/2 lie between n²/2 and (n + 1)²/2
    H = torch.zeros(n, n)
    for i, at in enumerate(_begins(n)):
        H[i, : i + 1] = packed[at : at + i + 1]
    return H.to(block.get_parameter(leader).device)


def _begins(n: int) -> Iterator[int]:
    return (i * (i + 1) // 2 for i in range(n))
