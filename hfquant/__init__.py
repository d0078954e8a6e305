"""hfquant: compress generative language models, measure what it cost, load them with transformers.

Importing this package is quick and registers hfquant's own checkpoint format with transformers, so that
`AutoModelForCausalLM.from_pretrained` reads it.  What needs torch is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import _autoload

if TYPE_CHECKING:
    from .compress.pipeline import compress as compress
    from .compress.plan import plan as plan
    from .plugin import HfQuantConfig as HfQuantConfig
    from .plugin import dequantize as dequantize
    from .plugin import load as load
    from .runtime.head import use_head as use_head
    from .runtime.kv_attention import use_kv_cache as use_kv_cache
    from .runtime.kv_cache import CompressedCache as CompressedCache
    from .runtime.offload.door import offload_generate as offload_generate
    from .runtime.offload.facade import Offloaded as Offloaded

__version__ = "0.1.0"

_HOME = {
    "CompressedCache": "runtime.kv_cache",
    "HfQuantConfig": "plugin",
    "Offloaded": "runtime.offload.facade",
    "compress": "compress",
    "dequantize": "plugin",
    "load": "plugin",
    "offload_generate": "runtime.offload.door",
    "plan": "compress",
    "use_head": "runtime.head",
    "use_kv_cache": "runtime.kv_attention",
}

__all__ = [
    "CompressedCache",
    "HfQuantConfig",
    "Offloaded",
    "__version__",
    "compress",
    "dequantize",
    "load",
    "offload_generate",
    "plan",
    "use_head",
    "use_kv_cache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    value = module if name == _HOME[name] else getattr(module, name)  # `compress` is a package that can be called
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


_autoload.install()
