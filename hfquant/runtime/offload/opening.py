"""A model, dense or compressed, opened for running block by block: modules on meta, weights known by their headers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from ...errors import SourceError
from ...model.skeleton import Skeleton
from ...model.source import Source, open_source
from ...tensors import formats
from ...tensors.formats import Wire
from ..experts import QExperts
from ..nn import Packed
from ..swap import swap

SCALES = (".weight_scale", ".scales")


class PackedSkeleton(Skeleton):
    """The skeleton of a compressed checkpoint: packed modules where the dense ones would be."""

    def __init__(self, source: Source, dtype: torch.dtype, wire: Wire) -> None:
        self.wire = wire
        super().__init__(source, dtype)

    def _adapt(self) -> None:
        swap(self.model, self.wire)
        packed = [m for m in self.model.modules() if isinstance(m, (Packed, QExperts))]
        self._parts = {id(m): {n for n, _ in m.named_parameters(recurse=False) if n != "bias"} for m in packed}

    def _conversions(self) -> list[Any]:
        if not any(isinstance(m, QExperts) for m in self.model.modules()):
            return super()._conversions()
        from ...plugin.conversions import companions, component_names  # fused experts are stored one by one

        names = component_names(self.wire)
        return companions(super()._conversions(), self.model, names, used=False)

    def _retype(self, name: str, dtype: torch.dtype) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in self._parts.get(id(module), ()):  # a scale has the type it was measured with
            old = module._parameters[leaf]
            assert old is not None
            dtype = old.dtype
        super()._retype(name, dtype)


def open_model(model: str | Path, dtype: torch.dtype | None = None, revision: str | None = None) -> Skeleton:
    """The skeleton of a dense or compressed model that can generate.

    dtype: what the modules compute in; by default what `from_pretrained` would choose.  Raises SourceError or
    FormatError for a model that cannot be read, before any weight is.
    """
    source = open_source(model, revision, quantized=True)
    stored: Mapping[str, Any] | None = getattr(source.config, "quantization_config", None)
    chosen = dtype or source.config.dtype or source.dtype
    if stored is None:
        skeleton = Skeleton(source, chosen)
    else:
        wire = formats.parse(dict(stored))
        wire = replace(wire, scale_dtype=_scale_dtype(source) or wire.scale_dtype)
        del source.config.quantization_config  # the modules are packed here; nothing else need know
        skeleton = PackedSkeleton(source, chosen, wire)
    if missing := skeleton.missing():
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SourceError(f"{model} lacks the weight {missing[0]}{more}", "download the model again")
    skeleton.model.config.use_cache = True
    skeleton.model.generation_config = _generation_config(skeleton.model, source.path)
    return skeleton


def _scale_dtype(source: Source) -> torch.dtype | None:
    """The type of the stored scales, which standard formats do not name in their config."""
    return next((info.dtype for name, info in source.tensors.items() if name.endswith(SCALES)), None)


def _generation_config(model: nn.Module, folder: Path) -> GenerationConfig:
    """What the model's authors recommend for generating, as `from_pretrained` finds it."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    found: GenerationConfig = model.generation_config
    return found
