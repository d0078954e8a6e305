"""A Llama of any depth with random weights, written without ever being in memory."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hfquant.tensors.shards import Entry, write_checkpoint
from tests.families import byte_tokenizer


def write(folder: Path, *, width: int = 512, blocks: int = 24, dtype: torch.dtype = torch.float32) -> int:
    """-> bytes of weights"""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=260, max_position_embeddings=1024, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        return torch.randn(shape, generator=generator).mul_(0.05).to(dtype)

    plan = [Entry(n, s, dtype, lambda s=s: make(s)) for n, s in shapes.items() if n != "lm_head.weight"]
    write_checkpoint(folder, plan, max_shard_size=100_000_000)
    return sum(entry.nbytes for entry in plan)
