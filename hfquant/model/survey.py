"""One look at everything a model holds, before any work: is it sound, and which model is it?"""

import hashlib

import torch

from ..errors import SourceError
from .headers import TensorInfo
from .source import Source

PIECE = 1 << 22  # elements of a tensor that are looked at together


def survey(source: Source, dtype: torch.dtype) -> str:
    """The sha256 of all that the source holds: weights, config and the files that are carried over.

    dtype: what weights of the source's usual type will be stored in.  Raises SourceError for a NaN, an infinity, or
    a value that this type cannot hold.  Every byte is read once, in pieces.
    """
    digest = hashlib.sha256()
    for name, info in sorted(source.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        limit = torch.finfo(dtype).max if info.dtype == source.dtype else None
        if (largest := _read(info, digest)) is None:
            continue
        if not largest < float("inf"):  # NaN too
            raise SourceError(
                f"{source.id}: `{name}` holds NaN or infinite values", "start from a sound copy of the model"
            )
        if limit is not None and largest > limit:
            raise SourceError(
                f"{source.id}: `{name}` reaches {largest:.3g}, more than {str(dtype).removeprefix('torch.')} holds",
                "store it as bfloat16: `--set dtype=bfloat16`",
            )
    for file in (source.path / "config.json", *source.files):
        digest.update(f"{file.relative_to(source.path)} {file.stat().st_size}".encode())
        with file.open("rb") as opened:
            while piece := opened.read(PIECE):
                digest.update(piece)
    return digest.hexdigest()


def _read(info: TensorInfo, digest: "hashlib._Hash") -> float | None:
    """The largest magnitude in a tensor, NaN if it holds one, None if its type cannot hold infinities anyway."""
    floating, largest = info.dtype.is_floating_point and info.dtype.itemsize > 1, 0.0
    for start in range(0, info.numel, PIECE):
        piece = info.read(start, min(PIECE, info.numel - start))
        digest.update(piece.view(torch.uint8).numpy().data)
        if floating:
            low, high = torch.aminmax(piece)
            peak = float(torch.maximum(high.abs(), low.abs()))
            if not peak <= largest:
                largest = peak
            if largest != largest:
                break
    return largest if floating else None
