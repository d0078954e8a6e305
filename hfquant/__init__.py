"""hfquant: compress generative language models, measure what it cost, load them with transformers."""
__version__ = "0.1.0"
