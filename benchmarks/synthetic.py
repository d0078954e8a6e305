"""A Llama-type model of any size with random bfloat16 weights, for what is measured of memory and of offloading."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hfquant.tensors.shards import Entry, write_checkpoint


@dataclass(frozen=True)
class Shape:
    """Of a model: features of the stream and inside, heads, of which some for keys and values, and tokens it knows."""

    width: int = 1536
    inner: int = 4608
    heads: int = 12
    key_heads: int = 4
    vocabulary: int = 1024

    @property
    def block(self) -> int:
        """Bytes of one."""
        keys = self.width * self.key_heads // self.heads
        return 2 * (2 * self.width * (self.width + keys) + 3 * self.width * self.inner)


def build(folder: Path, blocks: int, shape: Shape = Shape(), shard: int = 60_000_000) -> int:  # frozen
    """-> bytes of weights"""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=blocks,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, vocab_size=shape.vocabulary,
        dtype="bfloat16", tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}

    def make(of: tuple[int, ...]) -> torch.Tensor:
        return torch.ones(of, dtype=torch.bfloat16) if len(of) == 1 else torch.randn(of).mul_(0.02).bfloat16()

    torch.manual_seed(0)
    plan = [Entry(n, s, torch.bfloat16, lambda s=s: make(s)) for n, s in shapes.items() if n != "lm_head.weight"]
    write_checkpoint(folder, plan, max_shard_size=shard)
    return sum(e.nbytes for e in plan)


@contextmanager
def bounded(limit: int) -> Iterator[tuple[str, Path] | None]:
    """Within: a control group whose processes get no more memory than `limit` bytes, their cached files included.

    -> what enforces it and the file that a process writes its number in to join; None: no such group can be made here.
    """
    for root, file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / f"offload-{os.getpid()}"
        if not (root / "cgroup.procs").is_file() or not os.access(root, os.W_OK):
            continue
        group.mkdir()
        try:
            if (group / file).is_file():
                (group / file).write_text(str(limit))
                yield f"control group, {file}", group / "cgroup.procs"
                return
        finally:
            group.rmdir()
    yield None


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
