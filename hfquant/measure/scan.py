"""Reading a finished checkpoint back: every file and tensor in its place, every number finite."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, SourceError
from ..model.headers import TensorInfo, read_header
from ..model.survey import PIECE
from ..tensors.shards import INDEX

AGAIN = "the folder is damaged: compress again with `--fresh`, or copy it again from where it was whole"


def scan(folder: str | Path) -> dict[str, int]:
    """Check every safetensors file of a folder -> {"files", "tensors", "bytes"}: how much was read.

    Bytes are those of the tensors.  Raises CheckpointError naming the first file or tensor that is missing,
    truncated, stored twice, empty or not finite.
    """
    path = Path(folder)
    files = sorted(path.glob("*.safetensors"))
    index = path / INDEX
    if not files and not index.is_file():
        raise CheckpointError(f"{path} holds no safetensors files", "give the folder of a compressed checkpoint")
    found: dict[str, TensorInfo] = {}
    for file in files:
        header = _header(file)
        if twice := header.keys() & found.keys():
            name = min(twice)
            raise CheckpointError(f"`{name}` is in {found[name].file.name} and in {file.name}", AGAIN)
        found |= header
    if index.is_file():
        _check_index(_weight_map(index), found)
    for name, info in found.items():
        _check_tensor(name, info)
    return {"files": len(files), "tensors": len(found), "bytes": sum(t.nbytes for t in found.values())}


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(file)
    except SourceError as error:
        raise CheckpointError(error.message, AGAIN) from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        loaded: Any = json.loads(index.read_text("utf-8"))
        return {str(name): str(file) for name, file in loaded["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index.name} is not an index of shards: {error!r}", AGAIN) from error


def _check_index(weight_map: Mapping[str, str], found: Mapping[str, TensorInfo]) -> None:
    """The index and the shards name the same tensors in the same files."""
    present = {info.file.name for info in found.values()}
    for name, file in sorted(weight_map.items()):
        if file not in present:
            raise CheckpointError(f"the shard {file} is missing: the index says that it holds `{name}`", AGAIN)
        if name not in found or found[name].file.name != file:
            raise CheckpointError(f"`{name}` is not in {file}, where the index says it is", AGAIN)
    if extra := found.keys() - weight_map.keys():
        raise CheckpointError(f"`{min(extra)}` is in {found[min(extra)].file.name} but not in the index", AGAIN)


def _check_tensor(name: str, info: TensorInfo) -> None:
    """A name a module can have, something in it, and only finite numbers, read a piece at a time."""
    where = f"in {info.file.name}"
    if not name.isprintable() or not all(name.split(".")):
        raise CheckpointError(f"{name!r} {where} is not the name of a tensor", AGAIN)
    scales_of_none = name.endswith("weight_scale") and info.shape[0] > 0  # values that are kept as they are have none
    if not info.numel and not scales_of_none:
        raise CheckpointError(f"`{name}` {where} is empty: its shape is {list(info.shape)}", AGAIN)
    if not info.dtype.is_floating_point:
        return
    for start in range(0, info.numel, PIECE):
        piece = info.read(start, min(PIECE, info.numel - start))
        finite = torch.isfinite(piece.float() if info.dtype.itemsize == 1 else piece)
        if not finite.all():
            at = start + int((~finite).nonzero()[0])
            value = float(piece[at - start])
            raise CheckpointError(
                f"`{name}` {where} holds {value} at element {at:,} of {info.numel:,}",
                "the weights or the calibration overflowed: try dtype bfloat16 or float32, or another recipe",
            )
