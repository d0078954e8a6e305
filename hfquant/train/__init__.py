"""Training a whole compressed model: QuantGPT, and adapters on a checkpoint."""
