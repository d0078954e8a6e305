"""The hidden states between two blocks, on disk: memory holds one batch of them, whatever their number."""

import os
from pathlib import Path

import torch
from torch import Tensor

from ..model.headers import read_bytes


class Stream:
    """Hidden states [samples, *shape] in one flat file; written and read a few samples at a time."""

    def __init__(self, path: Path, samples: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.samples, self.shape, self.dtype = path, samples, shape, dtype
        self._stride = torch.Size(shape).numel() * dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.samples * self._stride

    def complete(self) -> bool:
        """Whether the file is there in full length."""
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    def write(self, at: int, x: Tensor) -> None:
        """Samples `at` and following.  x [n, *shape]"""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        raw = x.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy()
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.seek(at * self._stride)
            file.write(raw.data)

    def read(self, at: int, n: int) -> Tensor:
        """[n, *shape], in memory of its own."""
        raw = read_bytes(self.path, at * self._stride, n * self._stride)
        return raw.view(self.dtype).view(n, *self.shape)

    def sync(self) -> None:
        """Have the file survive a power cut."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
