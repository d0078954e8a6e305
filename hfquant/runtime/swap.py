"""Dense modules -> packed ones on meta, and back."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..tensors import formats
from ..tensors.encoding import Encoding
from ..tensors.formats import Format, Wire
from . import cache
from .experts import QExperts, dequantize_experts_, is_experts, swap_experts
from .nn import Packed, QEmbedding, QLinear


def kind(module: nn.Module) -> str | None:
    """What a module is to a wire format (one of `formats.KINDS`), None if it cannot be compressed."""
    if isinstance(module, (Packed, QExperts)):
        return None
    if is_experts(module):
        return "experts"
    # nn.MultiheadAttention reads this one's weight without calling it
    if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "linear"
    if _is_conv1d(module):
        return "conv1d"
    if isinstance(module, nn.Embedding) and (
        type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    ):
        return "embedding"
    return None


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that stores [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def swap(model: nn.Module, wire: Wire) -> list[str]:
    """Replace, on meta, every module the wire has an encoding for; returns their names.

    Modules whose weight is tied to a replaced embedding are replaced too, and share its parameters.  A module
    named exactly in the wire must be replaceable (FormatError); one that only matches a pattern and is not
    what the format stores (an embedding, a head tied to it) stays as it is.
    """
    fmt, tied = formats.load(wire.format), tied_modules(model)
    swapped = []
    for name, module in list(model.named_modules()):
        encoding = wire.encoding(name) if name not in tied else None
        if encoding is None or isinstance(module, (Packed, QExperts)):
            continue
        exact, what = name in wire.layers, kind(module)
        if what is None or (not exact and what == "embedding"):
            if exact:
                raise FormatError(f"{name} ({type(module).__name__}) cannot be compressed", "remove it from the recipe")
            continue
        if what == "experts":
            swap_experts(module, encoding, fmt, wire.scale_dtype)
        else:
            formats.check(fmt.name, {name: (encoding, _shape(module), what)})
            model.set_submodule(name, _packed(module, encoding, fmt, wire.scale_dtype))
        swapped.append(name)
    return swapped + [name for name, source in tied.items() if _share(model, name, source, wire)]


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, a Conv1D or a table."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if _is_conv1d(module) else (rows, columns)


def _packed(module: nn.Module, encoding: Encoding, fmt: Format, scale_dtype: torch.dtype) -> Packed:
    """An empty packed layer on meta in the place of a dense one."""
    out_features, in_features = _shape(module)
    common: dict[str, Any] = {
        "encoding": encoding,
        "fmt": fmt,
        "scale_dtype": scale_dtype,
        "dtype": cast(Tensor, module.weight).dtype,
    }
    if not isinstance(module, nn.Embedding):
        bias = getattr(module, "bias", None)
        layer = QLinear(in_features, out_features, bias is not None, transposed=_is_conv1d(module), **common)
        if bias is not None and not bias.is_meta:  # the model has its values already; keep this one
            layer.bias = bias
        return layer
    # Gemma's factor is a buffer (its value is on meta by now) beside the number it was made from
    rounded = hasattr(module, "scalar_embed_scale")
    factor = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
    table = QEmbedding(
        out_features,
        in_features,
        padding_idx=module.padding_idx,
        factor=factor,
        round_factor=rounded,
        **common,
    )
    table.origin = (_husk(module),)
    return table


def _husk(module: nn.Module) -> nn.Module:
    """The module without its weights: how to make the same dense class again."""
    husk = copy.copy(module)
    husk._parameters = {}
    return husk


def tied_modules(model: nn.Module) -> dict[str, str]:
    """Modules whose weight is another module's: name -> name of the module that owns it."""
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(param), name)
        if owner != name:
            tied[name] = owner
    tied |= getattr(model, "all_tied_weights_keys", {})
    suffix = ".weight"
    return {
        target.removesuffix(suffix): source.removesuffix(suffix)
        for target, source in tied.items()
        if target.endswith(suffix) and source.endswith(suffix)
    }


def _share(model: nn.Module, name: str, source: str, wire: Wire) -> bool:
    """Make the module `name` a packed one with the parameters of `source`, if that one is packed."""
    owner, module = model.get_submodule(source), model.get_submodule(name)
    if not isinstance(owner, Packed):
        if name in wire.layers:
            raise FormatError(
                f"{name} shares its weight with {source}, which is not compressed",
                "compress the embedding too (`embeddings` in the recipe), or keep the head",
            )
        return False
    if not isinstance(module, Packed):
        scale_dtype = owner.parts[1].dtype
        module = _packed(module, owner.encoding, owner.fmt, scale_dtype)
        model.set_submodule(name, module)
    share(module, owner)
    keys = getattr(model, "all_tied_weights_keys", None)
    if keys is not None:
        keys.update({f"{name}.{c}": f"{source}.{c}" for c in owner.components})
    return True


def share(head: Packed, table: Packed) -> None:
    """Let two packed modules hold the same Parameter objects."""
    for component in table.components:
        head._parameters[component] = table._parameters[component]


def dequantize_(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed module by the dense one it stands for, in place; what was tied stays tied."""
    made: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QExperts):
            dequantize_experts_(module, dtype)
        elif isinstance(module, Packed):
            key = id(module.parts[0])
            if key not in made:
                made[key] = nn.Parameter(module.dequantize(dtype), requires_grad=False)
            model.set_submodule(name, _dense(module, made[key], dtype))
            cache.forget(module.parts)


def _dense(module: Packed, weight: nn.Parameter, dtype: torch.dtype) -> nn.Module:
    out_features, in_features = module.shape
    if isinstance(module, QEmbedding):
        return _dense_embedding(module, weight)
    assert isinstance(module, QLinear)
    new: nn.Module
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        conv1d: Any = Conv1D(0, 0)
        conv1d.nf, conv1d.nx = out_features, in_features
        new = conv1d
        weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    else:
        new = nn.Linear(in_features, out_features, module.bias is not None, device="meta")
    new._parameters["weight"] = weight
    if module.bias is not None:
        new._parameters["bias"] = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return new


def _dense_embedding(module: QEmbedding, weight: nn.Parameter) -> nn.Module:
    new: nn.Module
    if module.origin is None:
        new = nn.Embedding(*module.shape, padding_idx=module.padding_idx, device="meta")
    else:
        new = copy.copy(module.origin[0])
        new._buffers = dict(new._buffers)
        if module.round_factor:
            new._buffers["embed_scale"] = torch.tensor(module.factor, device=weight.device)
    new._parameters = {"weight": weight}
    return new
