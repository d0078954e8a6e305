"""A Llama-type model of any size with random bfloat16 weights, for what is measured of offloading."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hfquant.tensors.shards import Entry, write_checkpoint

WIDTH, INNER, HEADS, VOCABULARY = 1536, 4608, 12, 1024
BLOCK = 2 * (WIDTH * WIDTH * 8 // 3 + 3 * WIDTH * INNER)  # bytes


def build(folder: Path, blocks: int) -> int:
    """-> bytes of weights"""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=blocks, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 3, vocab_size=VOCABULARY, dtype="bfloat16", tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else torch.randn(shape).mul_(0.02).bfloat16()

    torch.manual_seed(0)
    plan = [Entry(n, s, torch.bfloat16, lambda s=s: make(s)) for n, s in shapes.items() if n != "lm_head.weight"]
    write_checkpoint(folder, plan, max_shard_size=60_000_000)
    return sum(e.nbytes for e in plan)


@contextmanager
def evicting(folder: Path) -> Iterator[None]:
    """Within: another process keeps the files of a folder out of the page cache, ten times a second.

    Memory that is not allowed does not help through the back door.
    """
    helper = multiprocessing.Process(target=_evict, args=(folder,), daemon=True)
    helper.start()
    try:
        yield
    finally:
        helper.terminate()
        helper.join()


def _evict(folder: Path) -> None:
    os.sync()
    while True:
        for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.dat")]:
            try:
                fd = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        time.sleep(0.1)
