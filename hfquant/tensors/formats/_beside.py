"""What the native format stores beside a weight [out, in]: low rank, input scale, static activations.

weight_u                 int8 [out, r]
weight_v                 int8 [r, in]
weight_rank_scale        float32 [r]
weight_input_scale       float32 [in]
weight_activation_scale  float32 [1]
weight_activation_zero   float32 [1]    where activations are not symmetric
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..encoding import Encoding
from ..layer import LowRank, Quantized
from . import Extras, Spec


def refuses(encoding: Encoding, kind: str) -> str | None:
    """Why these cannot be stored for a kind of module; None if they can."""
    activations, static = encoding.activations, encoding.activations and encoding.activations.per == "static"
    if kind == "embedding" and activations:
        return "an embedding has no input to round"
    if kind in ("experts", "embedding") and (encoding.rank or encoding.scaled_input or static):
        what = "low-rank factors" if encoding.rank else "an input scale" if encoding.scaled_input else "static scales"
        return f"{kind} cannot have {what}"
    if activations and not 2 <= activations.bits <= 8:
        return f"activations of {activations.bits} bit do not exist in it"
    return None


def spec(encoding: Encoding, shape: tuple[int, int]) -> Spec:
    """Component name -> (shape, dtype)"""
    (out_features, in_features), r = shape, encoding.rank
    found: Spec = {}
    if r:
        found["weight_u"] = ((out_features, r), torch.int8)
        found["weight_v"] = ((r, in_features), torch.int8)
        found["weight_rank_scale"] = ((r,), torch.float32)
    if encoding.scaled_input:
        found["weight_input_scale"] = ((in_features,), torch.float32)
    if encoding.activations and encoding.activations.per == "static":
        found["weight_activation_scale"] = ((1,), torch.float32)
        if not encoding.activations.symmetric:
            found["weight_activation_zero"] = ((1,), torch.float32)
    return found


def pack(Q: Quantized) -> dict[str, Tensor]:
    """Component name -> tensor"""
    factors = Q.low_rank
    parts = {
        "weight_u": None if factors is None else factors.u.contiguous(),
        "weight_v": None if factors is None else factors.v.contiguous(),
        "weight_rank_scale": None if factors is None else factors.scale.float(),
        "weight_input_scale": None if Q.input_scale is None else Q.input_scale.float(),
        "weight_activation_scale": None if Q.activation_scale is None else Q.activation_scale.float().view(1),
        "weight_activation_zero": None if Q.activation_zero is None else Q.activation_zero.float().view(1),
    }
    return {name: tensor for name, tensor in parts.items() if tensor is not None and name in spec(Q.encoding, Q.shape)}


def extras(parts: Mapping[str, Tensor], encoding: Encoding) -> Extras:
    """The inverse of `pack`."""
    low_rank = None
    if encoding.rank:
        low_rank = LowRank(u=parts["weight_u"], v=parts["weight_v"], scale=parts["weight_rank_scale"])
    return Extras(
        low_rank=low_rank,
        input_scale=parts.get("weight_input_scale"),
        activations=encoding.activations,
        activation_scale=parts.get("weight_activation_scale"),
        activation_zero=parts.get("weight_activation_zero"),
    )
