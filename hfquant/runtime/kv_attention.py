"""A compressed cache as a model's usual one, and attention that reads it packed.

Both by transformers' own means: the cache is a `Cache` that the model is given where it would have been given an empty
`DynamicCache`, attention a function of its `AttentionInterface`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import RecipeError
from ..model.caches import ATTENTION as USUAL
from ..model.caches import check_cache, keeps_attention
from ..tensors.encoding import KVCache
from .kernels import explain
from .kv_cache import BITS, CompressedCache, compress_layers
from .kv_ops import attend
from .kv_view import StatesView

NAME = "hfquant_packed_cache"
Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # of a forward pass
CHANGES_SCORES = ("softcap", "s_aux", "position_bias")  # arguments of attention functions that `attend` does not take


def use_kv_cache(model: PreTrainedModel, cache: KVCache | int | None) -> None:
    """From now on, `model.generate` keeps keys and values so.

    cache: 8, 4 or 2 bits, or a `KVCache` with more to say; None: as they are.  A cache that is passed to `generate`
    is used as it is.  A forward pass on its own takes part if it is given an empty `DynamicCache`, or `use_cache=True`.

    Where attention is transformers' "sdpa", a single new token is compared with packed keys and weighs packed values;
    otherwise they are decoded first.  HFQUANT_EXPLAIN=1 says what happens, and why.
    Raises RecipeError for bits that do not exist, for a model that keeps nothing that would be smaller, and for queries
    that are to be rounded where keys are decoded first.
    """
    how = KVCache(cache) if isinstance(cache, int) else cache
    if how is None and not hasattr(model, "hfquant_kv_cache"):
        return
    if how is not None:
        if how.bits not in BITS:
            raise RecipeError(f"a cache of {how.bits} bits does not exist", "choose 8, 4 or 2")
        check_cache(model, how)
        if how.queries is not None and (used := model.config._attn_implementation) not in (USUAL, NAME):
            raise RecipeError(
                f"queries are rounded where attention is `{USUAL}`, and here it is `{used}`",
                f'load the model with `attn_implementation="{USUAL}"`, or leave `queries` out',
            )
        if not hasattr(model, "hfquant_kv_cache"):
            model.register_forward_pre_hook(_provide, with_kwargs=True)
        _read_packed(model)
    elif model.config._attn_implementation == NAME:
        model.set_attn_implementation(USUAL)
    model.hfquant_kv_cache = how


def _read_packed(model: PreTrainedModel) -> None:
    """Let attention be ours, where it can be."""
    used = model.config._attn_implementation
    if used == NAME:
        return
    if reason := f"its attention is `{used}`" if used != USUAL else keeps_attention(model):
        explain(f"hfquant: {type(model).__name__} decodes what its cache keeps packed: {reason}")
        return
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[USUAL])
    model.set_attn_implementation(NAME)


def _provide(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a forward pass: an empty cache that nobody chose becomes a compressed one."""
    how: KVCache | None = model.hfquant_kv_cache
    if how is None:
        return None
    given, lazy = kwargs.get("past_key_values"), model.config._attn_implementation == NAME
    if given is None:
        if kwargs.get("use_cache") is not True:
            return None
        given = CompressedCache.for_model(model, how.bits, how.window, how.group_size)
    own = given.self_attention_cache if isinstance(given, EncoderDecoderCache) else given
    if isinstance(own, CompressedCache) and given is not kwargs.get("past_key_values"):
        for layer in own.layers:
            layer.lazy, layer.queries = lazy, how.queries
    elif not own.get_seq_length() and (reason := _chosen(given, own)):
        explain(f"hfquant: this cache is used as it is: {reason}")
    elif type(own) is DynamicCache and not own.get_seq_length():
        compress_layers(own, how.bits, how.window, how.group_size, lazy, how.queries)
    return args, {**kwargs, "past_key_values": given}


def _chosen(given: Any, own: Any) -> str | None:
    """Why an empty cache was somebody's choice; None if it is what `generate` makes when it is told nothing."""
    if type(own) is not DynamicCache:
        return f"it is a {type(own).__name__}"
    if getattr(given, "_is_user_defined", False):
        return "it was passed to `generate`"
    return "it is offloaded" if own.offloading else None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: query [b, h, q, d], key and value [b, kv, n, d] -> [b, q, h, d]."""
    if isinstance(key, StatesView) and isinstance(value, StatesView):
        reason = _refuses(query, key, attention_mask, dropout, rest)
        if reason is None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            mask = None if attention_mask is None else attention_mask[:, 0, -1].expand(query.shape[0], -1)
            y = attend(query[:, :, 0], key.tokens, key.recent, scale, mask)
            return y.unsqueeze(1), None
        explain(f"hfquant: keys and values of {key.tokens.bits} bit are decoded: {reason}")
        key, value = key.decode(), value.decode()
    usual = ALL_ATTENTION_FUNCTIONS[USUAL]
    found: tuple[Tensor, Tensor | None] = usual(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
    )
    return found


def _refuses(query: Tensor, key: StatesView, mask: Tensor | None, dropout: float, rest: dict[str, Any]) -> str | None:
    """Why a query is not compared with packed keys; None if it is."""
    if query.shape[2] != 1:
        return f"{query.shape[2]} queries at once"
    if dropout:
        return "weights are dropped at random"
    if torch.is_grad_enabled() and (query.requires_grad or key.recent[0].requires_grad):
        return "gradients are wanted"
    for name in CHANGES_SCORES:
        if rest.get(name) is not None:
            return f"attention has `{name}`"
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return f"a mask of {str(mask.dtype).removeprefix('torch.')} may add anything to the scores"
    if mask.shape[1] != 1 or mask.shape[-1] != key.shape[2]:
        return f"a mask {list(mask.shape)} is not one of {key.shape[2]} tokens"
    return None
