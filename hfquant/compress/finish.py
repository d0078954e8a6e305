"""From finished blocks to a complete checkpoint: everything of the source that was not replaced is carried over."""

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..model.source import TensorInfo, read_header
from ..tensors import formats
from ..tensors.formats import Wire
from ..tensors.shards import Entry, write_checkpoint, write_text
from .plan import Plan

MAX_SHARD = 5_000_000_000


def finish(plan: Plan, wire: Wire) -> list[str]:
    """Write the checkpoint's files into `plan.out`; returns their names.  wire: how the layers turned out.

    They are written aside and moved when all are complete, config.json last: a folder with a config is whole.
    """
    aside = plan.journal.folder / "final"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_checkpoint(aside, list(_entries(plan)), MAX_SHARD)
    for file in plan.source.files:
        shutil.copyfile(file, aside / file.name)
    names = sorted(f.name for f in aside.iterdir())
    write_text(aside / "config.json", json.dumps(_config(plan, wire), indent=2, sort_keys=True) + "\n")
    for name in [*names, "config.json"]:
        (aside / name).replace(plan.out / name)
    return [*names, "config.json"]


def _entries(plan: Plan) -> Iterator[Entry]:
    """The checkpoint's tensors: the source's in its order, each replaced one's components in its place."""
    packed: dict[str, TensorInfo] = {}
    for file in sorted(plan.journal.blocks.glob("*.safetensors")):
        packed |= read_header(file)
    tied: dict[str, str] = getattr(plan.skeleton.model, "all_tied_weights_keys", {})
    names = set(plan.layers) | {name for name, owner in tied.items() if owner in plan.layers}
    replaced = {stored for name in names for stored in plan.skeleton.stored.get(name, ())}
    for name, info in plan.source.tensors.items():
        if name not in replaced:
            dtype = _carried_dtype(info, plan.dtype)
            yield Entry(name, info.shape, dtype, _reader(info, dtype))
    for name, info in packed.items():
        yield Entry(name, info.shape, info.dtype, _reader(info, info.dtype))


def _carried_dtype(info: TensorInfo, dtype: torch.dtype) -> torch.dtype:
    return dtype if info.dtype.is_floating_point and info.dtype.itemsize > 1 else info.dtype


def _reader(info: TensorInfo, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: info.read().view(info.shape).to(dtype)


def _config(plan: Plan, wire: Wire) -> dict[str, Any]:
    """The source's config.json as it was, with what changed: the type, and how the layers are stored."""
    config: dict[str, Any] = json.loads((plan.source.path / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config["quantization_config"] = formats.load(wire.format).config(wire)
    return config
