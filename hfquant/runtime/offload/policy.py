"""What is placed where: the paper's policy, in whole tensors, layers and batches."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Policy:
    """How to run.

    batch: prompts computed together (the paper's GPU batch).  batches: how many of them share one load of a layer
    (with `batch`, the paper's block).  weights: bytes of block weights that stay in memory, as many whole tensors as
    fit; the rest is read for every use.  cache_on_disk: keys and values lie in files, one layer of one batch in
    memory at a time.  cache_bits: 8, 4 or 2 compresses the cache; 16 leaves it as it is.  depth: layers read ahead.
    """

    batch: int = 8
    batches: int = 4
    weights: int = 0
    cache_on_disk: bool = False
    cache_bits: int = 16
    depth: int = 2
    threads: int = 2

    @property
    def block(self) -> int:
        """Prompts that share one load of a layer."""
        return self.batch * self.batches

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
