"""Compression of a dense checkpoint while it is read: one dense weight in memory at a time."""

from collections.abc import Mapping, Sequence
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
from ..tensors.encoding import Encoding
from ..tensors.formats import Format
from ..tensors.layer import Layer, Quantized
from .checkpoint import mark_initialized

if TYPE_CHECKING:
    from ..compress.selection import Target
    from .quantizer import HfQuantizerForHfQuant


class QuantizeOnLoad(ConversionOps):  # type: ignore[misc]
    """{dense parameter: tensor} -> {component: tensor}, with packed modules put where the dense ones were.

    transformers would catch what goes wrong here, go on with the next weight, and end in an error that does not say
    what it was: the first failure is kept for `HfQuantizerForHfQuant`, and nothing more is done.
    """

    def __init__(self, quantizer: "HfQuantizerForHfQuant") -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self, input_dict: Mapping[str, Any], *, model: nn.Module, missing_keys: set[str], **_: Any
    ) -> dict[str, Tensor]:
        if self.quantizer.failure is not None:
            return {}
        try:
            return self._convert(input_dict, model, missing_keys)
        except Exception as error:
            error.add_note(f"(while `{next(iter(input_dict))}` was compressed)")
            self.quantizer.failure = error
            for module in model.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # nobody will see what is in it
            return {}

    def _convert(self, input_dict: Mapping[str, Any], model: nn.Module, missing_keys: set[str]) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            target = self.quantizer.targets.get(name)
            if target is None:
                loaded[name] = tensor
                continue
            matrices = self._compress(target, tensor)
            parts = pack(self.quantizer.fmt, target, matrices)
            self._swap(model, target, matrices[0].encoding, missing_keys)
            missing_keys.discard(name)
            loaded |= {part: frozen(p.to(tensor.device)) for part, p in parts.items()}
        return loaded

    def _compress(self, target: "Target", tensor: Tensor) -> list[Quantized]:
        recipe, scale_dtype = self.quantizer.quantization_config.recipe, self.quantizer.wire.scale_dtype
        W = tensor.T if target.kind == "conv1d" else tensor
        matrices = W.unbind(0) if target.kind == "experts" else [W]
        return [run_steps(recipe, target, W, scale_dtype) for W in matrices]

    def _swap(self, model: nn.Module, target: "Target", encoding: Encoding, missing_keys: set[str]) -> None:
        """Put the packed module, still on meta, in place; keep what was loaded of the dense one."""
        path = target.layer
        dense = model.get_submodule(path)
        if isinstance(dense, (Packed, QExperts)):
            return
        loaded = {n: p for n, p in dense.named_parameters(recurse=False) if not p.is_meta}
        tied = [name for name, source in tied_modules(model).items() if source == path]
        swap(model, replace(self.quantizer.wire, layers={}, ignore=()).as_written({target.layer: encoding}))
        mark_initialized(model)
        module = model.get_submodule(path)
        for name, parameter in loaded.items():
            if name in module._parameters:
                module._parameters[name] = parameter
        if isinstance(module, Packed):
            # transformers ties only what it thinks was not in the checkpoint
            missing_keys |= {f"{other}.{component}" for other in tied for component in module.components}


def pack(fmt: Format, target: "Target", matrices: Sequence[Quantized]) -> dict[str, Tensor]:
    """Full name in the model -> component: `q_proj.weight_scale`; of experts stacked, `experts.down_proj_scale`."""
    packed = [fmt.pack(Q) for Q in matrices]
    if target.kind != "experts":
        return {f"{target.layer}.{component}": tensor for component, tensor in packed[0].items()}
    leaf = target.parameter.rpartition(".")[2]
    return {
        f"{target.layer}.{experts.component_name(leaf, component)}": torch.stack([p[component] for p in packed])
        for component in packed[0]
    }


def run_steps(recipe: Recipe, target: "Target", W: Tensor, scale_dtype: torch.dtype) -> Quantized:
    """The recipe's steps on one weight matrix [out, in], as the streaming compressor applies them."""
    from ..compress.selection import steps_for

    layer = Layer(name=target.layer, W=W.detach().to("cpu", torch.float32).contiguous())
    for method in steps_for(target, recipe):
        layer = method(layer, target.grid, scale_dtype)
    return layer.stored(scale_dtype)


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that transformers will take for loaded."""
    parameter = nn.Parameter(tensor.contiguous(), requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    return parameter
