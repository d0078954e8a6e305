"""A trained student as a complete checkpoint: its codes as trained, nothing is rounded again."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..compress.finish import config_of, publish
from ..compress.result import LayerResult
from ..compress.selection import STORED_AS, Target, stored_bytes
from ..tensors import formats
from ..tensors.formats import Wire
from ..tensors.shards import Entry
from .contrastive import Projection
from .modules import Learning
from .plan import Training


def write(student: PreTrainedModel, plan: Training) -> tuple[list[str], Wire]:
    """Write the student into `plan.out`, with what the source has beside its weights -> the files, how it is stored.

    What is not compressed is written in `plan.dtype`.  Raises FormatError where a layer turned out to be what the
    format cannot store.
    """
    targets = plan.targets
    layers = {t.layer: learner(student, t).quantized().encoding for t in targets.values()}
    formats.check(
        plan.wire.format, {t.layer: (layers[t.layer], t.shape, STORED_AS.get(t.kind, t.kind)) for t in targets.values()}
    )
    wire = plan.wire.as_written(layers)
    config = config_of(plan.source, plan.dtype, wire) | {"architectures": [type(student).__name__]}
    return publish(_entries(student, targets, wire, plan.dtype), plan.source, config, plan.journal, plan.out), wire


def learner(student: PreTrainedModel, target: Target) -> Learning:
    """The layer that a target became."""
    module = student.get_submodule(target.layer)
    assert isinstance(module, Learning)
    return module


def results(student: PreTrainedModel, teacher: PreTrainedModel, plan: Training, wire: Wire) -> Iterator[LayerResult]:
    """For the report.  error: ‖W − Ŵ‖ / ‖W‖, how far each weight went from the original's: no measure of quality."""
    fmt = formats.load(wire.format)
    blocks = 1 + max(layer.block for layer in plan.layers.values())
    for name, layer in plan.layers.items():
        target = plan.targets[name]
        W, encoding = teacher.get_parameter(name).detach().float(), wire.layers[target.layer]
        on_grid = learner(student, target).on_grid().detach()
        error = float((W - (on_grid.T if target.kind == "conv1d" else on_grid)).norm() / W.norm().clamp(min=1e-12))
        yield LayerResult(
            name=name, kind=layer.kind, shape=layer.shape, grid=layer.grid, method="quantgpt", error=error,
            bytes_before=layer.bytes_before, bytes_after=stored_bytes(fmt, encoding, layer.shape, wire.scale_dtype),
            seconds=0.0, notes=(), block=layer.block, blocks=blocks, trail=(("quantgpt", error),),
            encoding=str(encoding),
        )  # fmt: skip


def _entries(
    student: PreTrainedModel, targets: Mapping[str, Target], wire: Wire, dtype: torch.dtype
) -> Iterator[Entry]:
    """The tensors in the order of the model: what is compressed as its components, all else in its own values."""
    fmt, tied = formats.load(wire.format), getattr(student, "all_tied_weights_keys", {})
    for name, tensor in student.state_dict().items():
        if name in tied or ".scaling." in name or name.startswith(f"{Projection.NAME}."):
            continue
        if name not in targets:
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            yield Entry(name, tuple(tensor.shape), kept, partial(_value, tensor, kept))
            continue
        target = targets[name]
        own = learner(student, target)
        spec = fmt.spec(wire.layers[target.layer], target.shape, wire.scale_dtype)
        parts: dict[str, Tensor] = {}
        for component, (shape, kind) in spec.items():
            yield Entry(f"{target.layer}.{component}", shape, kind, _part(own, fmt.pack, component, parts))


def _value(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype)


def _part(
    own: Learning, pack: Callable[[Any], dict[str, Tensor]], component: str, parts: dict[str, Tensor]
) -> Callable[[], Tensor]:
    """One component of a layer; all are made when the first is asked for."""

    def make() -> Tensor:
        if not parts:
            parts.update({name: tensor.cpu() for name, tensor in pack(own.quantized()).items()})
        return parts.pop(component)

    return make
