"""From finished blocks to a complete checkpoint: everything of the source that was not replaced is carried over."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..model.headers import TensorInfo, read_header
from ..model.source import Source
from ..tensors import formats
from ..tensors.formats import Wire
from ..tensors.shards import Entry, write_checkpoint, write_text
from .journal import Journal
from .plan import Plan

MAX_SHARD = 5_000_000_000


def finish(plan: Plan, wire: Wire) -> list[str]:
    """Write the checkpoint's files into `plan.out`; returns their names.  wire: how the layers turned out."""
    return publish(_entries(plan), plan.source, config_of(plan.source, plan.dtype, wire), plan.journal, plan.out)


def publish(
    entries: Iterable[Entry], source: Source, config: Mapping[str, Any], journal: Journal, out: Path
) -> list[str]:
    """Write these tensors, what the source has beside its weights, and config.json into `out` -> the files' names.

    They are written aside and moved when all are complete, config.json last: a folder with a config is whole.
    """
    aside = journal.folder / "final"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write_checkpoint(aside, list(entries), MAX_SHARD)
    for file in source.files:
        target = aside / file.relative_to(source.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    names = sorted(str(f.relative_to(aside)) for f in aside.rglob("*") if f.is_file())
    write_text(aside / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    journal.move([*names, "config.json"])
    for name in [*names, "config.json"]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).replace(out / name)
    return [*names, "config.json"]


def _entries(plan: Plan) -> Iterator[Entry]:
    """The checkpoint's tensors: the source's in its order, each replaced one's components in its place."""
    packed: dict[str, TensorInfo] = {}
    for entry in plan.journal.entries():
        file = plan.journal.block_file(entry["index"])
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: it holds {entry['block']}", "start again with `--fresh`")
        packed |= read_header(file)
    tied: dict[str, str] = getattr(plan.skeleton.model, "all_tied_weights_keys", {})
    names = set(plan.layers) | {name for name, owner in tied.items() if owner in plan.layers}
    replaced = {stored for name in names for stored in plan.skeleton.stored.get(name, ())}
    replaced |= packed.keys()  # and norms and biases that a block was rewritten with
    for name, info in plan.source.tensors.items():
        if name not in replaced:
            dtype = plan.dtype if info.dtype == plan.source.dtype else info.dtype
            yield Entry(name, info.shape, dtype, _reader(info, dtype))
    for name, info in packed.items():
        yield Entry(name, info.shape, info.dtype, _reader(info, info.dtype))


def _reader(info: TensorInfo, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: info.load(dtype)


def config_of(source: Source, dtype: torch.dtype, wire: Wire) -> dict[str, Any]:
    """The source's config.json as it was, with what changed: the type, and how the layers are stored."""
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text())
    config.pop("torch_dtype", None)
    config.pop("auto_map", None)  # names code files that are not carried over, and were not needed
    config |= source.changes
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["quantization_config"] = formats.load(wire.format).config(wire)
    return config
