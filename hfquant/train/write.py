"""A trained student as a complete checkpoint: its codes as trained, nothing is rounded again."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compress.selection import STORED_AS, Target
from ..model.source import Source
from ..tensors import formats
from ..tensors.formats import Wire
from ..tensors.shards import Entry, write_checkpoint, write_text
from .modules import Learning


def write(
    student: PreTrainedModel, targets: Mapping[str, Target], wire: Wire, source: Source, dtype: torch.dtype, out: Path
) -> list[str]:
    """Write the student into a new folder, with what the source has beside its weights -> the files' names.

    dtype: of what is not compressed.  Raises FormatError where a layer turned out to be what the format cannot store.
    """
    layers = {t.layer: _learner(student, t).quantized().encoding for t in targets.values()}
    formats.check(
        wire.format, {t.layer: (layers[t.layer], t.shape, STORED_AS.get(t.kind, t.kind)) for t in targets.values()}
    )
    out.mkdir(parents=True)
    written = wire.as_written(layers)
    write_checkpoint(out, list(_entries(student, targets, written, dtype)))
    for file in source.files:
        target = out / file.relative_to(source.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    config |= {"dtype": str(dtype).removeprefix("torch."), "architectures": [_class(student)]}
    config["quantization_config"] = formats.load(wire.format).config(written)
    write_text(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())


def _class(student: PreTrainedModel) -> str:
    return type(student).__name__


def _learner(student: PreTrainedModel, target: Target) -> Learning:
    module = student.get_submodule(target.layer)
    assert isinstance(module, Learning)
    return module


def _entries(
    student: PreTrainedModel, targets: Mapping[str, Target], wire: Wire, dtype: torch.dtype
) -> Iterator[Entry]:
    """The tensors in the order of the model: what is compressed as its components, all else in its own values."""
    fmt, tied = formats.load(wire.format), getattr(student, "all_tied_weights_keys", {})
    for name, tensor in student.state_dict().items():
        if name in tied or ".scaling." in name or name.startswith("projection."):
            continue
        if name not in targets:
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            yield Entry(name, tuple(tensor.shape), kept, partial(_value, tensor, kept))
            continue
        target = targets[name]
        learner = _learner(student, target)
        spec = fmt.spec(wire.layers[target.layer], target.shape, wire.scale_dtype)
        parts: dict[str, Tensor] = {}
        for component, (shape, kind) in spec.items():
            yield Entry(f"{target.layer}.{component}", shape, kind, _part(learner, fmt.pack, component, parts))


def _value(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype)


def _part(
    learner: Learning, pack: Callable[[Any], dict[str, Tensor]], component: str, parts: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """One component of a layer; all are made when the first is asked for."""

    def make() -> Tensor:
        if not parts:
            parts.update({name: tensor.cpu() for name, tensor in pack(learner.quantized()).items()})
        return parts.pop(component)

    return make
