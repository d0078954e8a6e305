"""How it is done: plan, then block after block, then the checkpoint."""

from .pipeline import LayerResult, compress
from .plan import LayerPlan, Plan, plan
from .resident import compress_model

__all__ = ["LayerPlan", "LayerResult", "Plan", "compress", "compress_model", "plan"]
