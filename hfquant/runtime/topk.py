"""Attention over the tokens that matter: FlexGen's sparse attention (Sheng et al., 2023, section 5).

For a new token, the weights of all tokens before it are computed, and only the values of those with the largest are
used.  A prompt attends to itself in full.  Beyond the paper, the tokens that are kept share the weight of those that
are dropped: without that, a tenth of the tokens costs a small model seven times as much (docs/offload.md).
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import RecipeError


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    *,
    share: float,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [b, h, q, d], key and value [b, kv, n, d] -> [b, q, h, d].

    attention_mask: added to the scores, [b or 1, 1, q, n].  Raises RecipeError for sinks, which are no tokens.
    """
    if rest.get("s_aux") is not None:
        raise RecipeError("attention with sinks cannot leave tokens out", "leave --attention-top at 1")
    if query.shape[2] > 1 and softcap is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, position_bias=position_bias, **rest
        )
        return out
    weights = _weights(query, key, attention_mask, scaling, softcap, position_bias)
    if query.shape[2] > 1:
        mixed = weights @ value.unsqueeze(2)
    else:
        mixed = _largest(weights.squeeze(3), value, share).unsqueeze(3)
    return mixed.flatten(1, 2).transpose(1, 2).contiguous(), None


def _weights(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None, bias: Tensor | None
) -> Tensor:
    """softmax of the scores: [b, kv, heads of a group, q, n]"""
    groups = query.unflatten(1, (key.shape[1], -1))
    scores = groups @ key.unsqueeze(2).mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    for added in (bias, mask):
        if added is not None:
            heads = added.expand(-1, query.shape[1], -1, -1)[..., -query.shape[2] :, : key.shape[2]]
            scores = scores + heads.unflatten(1, (key.shape[1], -1))
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype)


def _largest(weights: Tensor, value: Tensor, share: float) -> Tensor:
    """weights [b, kv, g, n], value [b, kv, n, d] -> [b, kv, g, d]

    From the newest token, whose weight stays as it is, and the heaviest others, which take over that of the rest.
    """
    n, d = value.shape[2:]
    count = math.ceil(share * (n - 1))
    heaviest = weights[..., :-1].topk(count, -1)
    where = heaviest.indices.flatten(2).unsqueeze(-1).expand(-1, -1, -1, d)
    few = value.gather(2, where).unflatten(2, (weights.shape[2], count))  # [b, kv, g, count, d]
    whole, kept = (w.sum(-1, keepdim=True, dtype=torch.float32) for w in (weights[..., :-1], heaviest.values))
    scale = whole / kept.clamp_min(torch.finfo(torch.float32).tiny)
    old = ((heaviest.values * scale).to(value.dtype).unsqueeze(-2) @ few).squeeze(-2)
    return old + weights[..., -1:] * value[:, :, -1:]


def use_topk(model: PreTrainedModel, share: float) -> None:
    """From now on, every new token sees the values of only this share of the tokens before it.  1: of all, as usual.

    Raises RecipeError for a share that makes no sense, and for a model whose attention cannot be replaced.
    """
    if not 0 < share <= 1:
        raise RecipeError(f"attention to a share of {share} of the tokens", "choose up to 1; 0.1 is usual")
    usual = getattr(model, "_hfquant_attention", None) or model.config._attn_implementation
    model._hfquant_attention = usual
    name = usual if share == 1 else f"hfquant_top_{share}"
    if share < 1:
        ALL_ATTENTION_FUNCTIONS.register(name, partial(attend, share=share))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, eager_mask)
        if not model._can_set_attn_implementation():
            raise RecipeError(
                f"{type(model).__name__} has an attention of its own, which cannot leave tokens out",
                "leave --attention-top at 1",
            )
    if name != model.config._attn_implementation:
        model.set_attn_implementation(name)
