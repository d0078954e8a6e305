"""What a model keeps of the tokens it has seen, and whether that can be kept in fewer bits."""

from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import RecipeError


def check_cache(model: nn.Module, cache: str) -> None:
    """Raises RecipeError if nothing of what this model keeps would be smaller in such a cache, e.g. `kv8`."""
    if reason := _refuses(model):
        raise RecipeError(
            f"{type(model).__name__} has no use for `{cache}`: {reason}", "leave `kv_cache` out of the recipe"
        )


def _refuses(model: Any) -> str | None:
    config = getattr(model, "config", None)
    if config is None or not getattr(model, "_supports_default_dynamic_cache", lambda: False)():
        return "it does not keep keys and values in transformers' `DynamicCache`"
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    if not any(type(layer) is DynamicLayer for layer in layers):
        return "none of its layers keeps all tokens, so that what it keeps does not grow"
    return None
