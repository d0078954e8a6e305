"""How it is done: plan, then block after block, then the checkpoint."""

import sys
from types import ModuleType
from typing import Any

from .layout import LayerPlan
from .pipeline import compress
from .plan import Plan, plan
from .resident import compress_model
from .result import LayerResult

__all__ = ["LayerPlan", "LayerResult", "Plan", "compress", "compress_model", "plan"]


class _Callable(ModuleType):
    """Lets `hfquant.compress(...)` mean the function although this package, once imported, has its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
