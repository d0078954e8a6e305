"""Keys and values as a compressed cache keeps them."""

import torch
from torch import Tensor

from ..tensors.packing import pack_stream

LARGEST = torch.finfo(torch.float16).max
NAMES = ("key_words", "key_scale", "key_low", "value_words", "value_scale", "value_low")


def encode(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric rounding over one dimension.

    x [..., n, d] -> codes uint8 of the same shape, and scale and minimum, float16 with 1 in the place of `dim`.
    The codes are chosen for the rounded minimum, so that it costs no accuracy.  A constant group is exact up to
    float16.
    """
    low = x.amin(dim, keepdim=True).float().clamp(-LARGEST, LARGEST).half()
    width = (x.amax(dim, keepdim=True).float() - low.float()).clamp(min=0) / (2**bits - 1)
    scale = width.clamp(max=LARGEST).half()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = ((x.float() - low.float()) / scale.float()).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, low


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., d] -> int32 [..., ⌈d·bits/32⌉]; the inverse is `kv_packed.unpack`."""
    words = pack_stream(codes.reshape(-1, codes.shape[-1]), bits)
    return words.view(*codes.shape[:-1], -1)


def pack_tokens(keys: Tensor, values: Tensor, bits: int, group: int, channels: int) -> list[Tensor]:
    """Whole groups of tokens [batch, heads, n, d] -> what `NAMES` names, as `kv_packed.PackedTokens` has it.

    Keys share a scale per channel and `group` tokens, values per token and `channels` channels.
    """
    codes, scale, low = encode(keys.unflatten(2, (-1, group)), bits, 3)
    of_keys = [pack(codes.flatten(2, 3), bits), scale.squeeze(3), low.squeeze(3)]
    codes, scale, low = encode(values.unflatten(3, (-1, channels)), bits, 4)
    return [*of_keys, pack(codes.flatten(3), bits), scale.squeeze(4), low.squeeze(4)]
