"""Fused experts in a checkpoint: one tensor per expert and projection on disk, one per parameter in memory.

transformers converts between the two by patterns: `.experts.*.w1.weight` and `.experts.*.w3.weight` are merged
into `.experts.gate_up_proj` when a model is loaded, and taken apart when it is saved.  A packed weight has
several components, each of which has to make the same way.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from ..tensors.formats import Wire, load

WEIGHT = "weight"


def component_names(wire: Wire) -> list[str]:
    """The components that a weight may have in a checkpoint."""
    fmt = load(wire.format)
    names = {n: None for e in wire.layers.values() for n in fmt.spec(e, (32, 32), wire.scale_dtype)}
    return list(names)


def companions(
    conversions: Sequence[WeightTransform], model: nn.Module, components: Sequence[str], *, used: bool
) -> list[WeightTransform]:
    """`conversions`, and for each that makes a packed parameter one like it for every component.

    used: mark the new ones as used, as transformers keeps only those for saving that matched something in the
    checkpoint, and while a dense checkpoint is compressed the companions match nothing.
    """
    parameters = [name for name, _ in model.named_parameters()]
    result: list[WeightTransform] = []
    for conversion in conversions:
        extra = _copies(conversion, parameters, components) if isinstance(conversion, WeightConverter) else []
        if extra:
            # after `dequantize()` the model has the dense parameter again, and saving takes it apart
            conversion._was_used = conversion._was_used or WEIGHT not in components
        for copy in extra:
            copy._was_used = used
        result += [conversion, *extra]
    return result


def _copies(converter: WeightConverter, parameters: Sequence[str], components: Sequence[str]) -> list[WeightTransform]:
    sources, targets = converter._original_source_patterns, converter._original_target_patterns
    if len(targets) != 1 or not all(source.endswith(f".{WEIGHT}") for source in sources):
        return []
    made: list[WeightTransform] = []
    for component in components:
        suffix = component.removeprefix(WEIGHT)
        if not suffix or not any(re.search(f"{targets[0]}{suffix}$", name) for name in parameters):
            continue
        operations = [MergeShapes()] if suffix == "_shape" else list(converter.operations)
        made.append(
            converter.copy([source + suffix for source in sources], [targets[0] + suffix], operations=operations)
        )
    return made


class MergeShapes(ConversionOps):  # type: ignore[misc]
    """(out, in) of each expert's projections -> [experts, 2] with the rows of the merged parameter."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        per_projection = [torch.stack(list(input_dict[pattern])) for pattern in source_patterns]
        rows = torch.stack([shapes[:, 0] for shapes in per_projection]).sum(0)
        return {target_patterns[0]: torch.stack([rows, per_projection[0][:, 1]], 1)}

    @property
    def reverse_op(self) -> "ConversionOps":
        return SplitShapes()


class SplitShapes(ConversionOps):  # type: ignore[misc]
    """The inverse: the projections that one parameter was merged from have equal shapes."""

    def convert(
        self, input_dict: Mapping[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        merged: Tensor = tensors[0] if isinstance(tensors, list) else tensors
        each = torch.stack([merged[:, 0] // len(target_patterns), merged[:, 1]], 1)
        return {
            pattern.replace("*", str(expert)): shape.clone()
            for pattern in target_patterns
            for expert, shape in enumerate(each)
        }

    @property
    def reverse_op(self) -> "ConversionOps":
        return MergeShapes()
