"""Training a whole compressed model: QuantGPT, and adapters on a checkpoint."""

from .plan import Training, plan
from .run import train

__all__ = ["Training", "plan", "train"]
