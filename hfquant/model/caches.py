"""What a model keeps of the tokens it has seen, and whether that can be kept in fewer bits."""

from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import RecipeError
from ..tensors.encoding import KVCache

ATTENTION = "sdpa"  # transformers' own, in whose place attention that reads a cache packed is put


def check_cache(model: nn.Module, cache: KVCache) -> None:
    """Raises RecipeError if nothing of what this model keeps would be smaller in such a cache, or if its queries
    cannot be rounded."""
    if reason := _refuses(model):
        raise RecipeError(
            f"{type(model).__name__} has no use for `{cache}`: {reason}", "leave `kv_cache` out of the recipe"
        )
    if cache.queries is None:
        return
    if cache.queries != 8:
        raise RecipeError(f"queries of {cache.queries} bits do not exist", "choose 8, or leave them as they are")
    if reason := keeps_attention(model) or _changes_scores(model):
        raise RecipeError(
            f"{type(model).__name__} cannot compare queries in 8 bit: {reason}",
            f"leave `queries` out: `kv{cache.bits}`",
        )


def keeps_attention(model: Any) -> str | None:
    """Why another attention cannot take the place of this model's; None if it can."""
    return None if model._can_set_attn_implementation() else "its attention cannot be replaced"


def _changes_scores(model: Any) -> str | None:
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has `softcap`"
    return None


def _refuses(model: Any) -> str | None:
    config = getattr(model, "config", None)
    if config is None or not getattr(model, "_supports_default_dynamic_cache", lambda: False)():
        return "it does not keep keys and values in transformers' `DynamicCache`"
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    if not any(type(layer) is DynamicLayer for layer in layers):
        return "none of its layers keeps all tokens, so that what it keeps does not grow"
    return None
