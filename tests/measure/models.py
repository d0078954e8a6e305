"""Models and texts of a few kilobytes for the tests of measuring."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.families import byte_tokenizer

WORDS = "The quick brown fox jumps over the lazy dog, and nobody knows what the dog thinks of it. "
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "vocab_size": 260,
}


def tiny(seed: int = 0, spread: float = 0.3) -> PreTrainedModel:
    """A random Llama whose predictions are far from uniform."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=spread)).eval()


def save(model: PreTrainedModel, folder: Path, **kwargs: object) -> Path:
    model.save_pretrained(folder, **kwargs)
    byte_tokenizer().save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    return folder


def nudged(model: PreTrainedModel, by: float) -> PreTrainedModel:
    """The model with noise on its linear layers: something like a compressed one."""
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            shift = torch.randn(parameter.shape, generator=noise)
            parameter.data += by * parameter.data.std() * shift
    return model
