"""Compression of a dense checkpoint while it is read: one dense weight in memory at a time."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from ..recipe import Recipe
from ..runtime import experts
from ..runtime.experts import QExperts
from ..runtime.nn import Packed
from ..runtime.swap import swap, tied_modules

from ..tensors.layer import Layer, Quantized
from .selection import Target

if TYPE_CHECKING:
    from .quantizer import HfQuantizerForHfQuant


class QuantizeOnLoad(ConversionOps):
    """{dense parameter: tensor} -> {component: tensor}, with packed modules put where the dense ones were."""

    def __init__(self, quantizer: "HfQuantizerForHfQuant") -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: Mapping[str, Any], *, model: nn.Module, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            target = self.quantizer.targets.get(name)
            if target is None:
                loaded[name] = tensor
                continue
            parts = self._parts(target, tensor)
            self._swap(model, target, missing_keys)
            missing_keys.discard(name)
            loaded |= {part: _frozen(p.to(tensor.device)) for part, p in parts.items()}
        return loaded

    def _parts(self, target: Target, tensor: Tensor) -> dict[str, Tensor]:
        """Full name -> component, with a leading expert dimension where the weight has one."""
        recipe, wire, fmt = self.quantizer.quantization_config.recipe, self.quantizer.wire, self.quantizer.fmt
        matrices = tensor.unbind(0) if target.kind == "experts" else [tensor.T if target.kind == "conv1d" else tensor]
        packed = [fmt.pack(run_steps(recipe, target, W, wire.scale_dtype)) for W in matrices]
        return {
            component_name(target, c): torch.stack([p[c] for p in packed]) if target.kind == "experts" else packed[0][c]
            for c in packed[0]
        }

    def _swap(self, model: nn.Module, target: Target, missing_keys: set[str]) -> None:
        """Put the packed module, still on meta, in place; keep what was loaded of the dense one."""
        path = target.layer
        dense = model.get_submodule(path)
        if isinstance(dense, (Packed, QExperts)):
            return
        loaded = {n: p for n, p in dense.named_parameters(recurse=False) if not p.is_meta}
        tied = [name for name, source in tied_modules(model).items() if source == path]
        swap(model, replace(self.quantizer.wire, layers={target.layer: target.grid}, ignore=()))
        module = model.get_submodule(path)
        for name, parameter in loaded.items():
            if name in module._parameters:
                module._parameters[name] = parameter
        if isinstance(module, Packed):
            # transformers ties only what it thinks was not in the checkpoint
            missing_keys |= {f"{other}.{component}" for other in tied for component in module.components}


def component_name(target: Target, component: str) -> str:
    """The name of a component in the model: `q_proj.weight_scale`, `experts.down_proj_scale`."""
    leaf = target.parameter.rpartition(".")[2]
    return f"{target.layer}.{experts.component_name(leaf, component) if target.kind == 'experts' else component}"


def run_steps(recipe: Recipe, target: Target, W: Tensor, scale_dtype: torch.dtype) -> Quantized:
    """The recipe's steps on one weight matrix [out, in], as the streaming compressor applies them."""
    layer = Layer(name=target.layer, W=W.detach().to("cpu", torch.float32).contiguous())
    for step in recipe.steps:
        layer = step.build()(layer, target.grid, scale_dtype)
    assert layer.Q is not None
    return layer.Q


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)
