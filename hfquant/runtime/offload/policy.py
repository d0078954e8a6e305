"""What is placed where: the paper's policy, in whole tensors, layers and batches."""

from dataclasses import asdict, dataclass
from typing import Any

from ...errors import ResourceError
from ..kv_cache import BITS

EVERY_LAYER = 1 << 20  # for `cache_on_disk`


@dataclass(frozen=True)
class Policy:
    """How to run.

    batch: prompts computed together (the paper's GPU batch).  batches: how many of them share one load of a layer
    (with `batch`, the paper's block).  weights: bytes of block weights that stay in memory, as many whole tensors as
    fit; the rest is read for every use.  cache_on_disk: how many layers of the decoder have their keys and values in
    files, the one that runs and the one that is read ahead in memory.  cache_bits: 8, 4 or 2 compresses the cache; 16
    leaves it as it is.  depth: layers read ahead.  threads: that read.  attention: the share of the tokens before it
    whose values a new token uses (sparse attention); 1 is usual.  chunk: tokens of a prompt that pass the blocks
    together, at most; None: all.  Weights are read for every chunk, and activations are no larger than one: so batches
    can be large, which makes the passes of single tokens fast, where whole prompts of as many would not fit.  An
    encoder reads its input as a whole.  Raises ResourceError for numbers that make no sense.
    """

    batch: int = 8
    batches: int = 4
    weights: int = 0
    cache_on_disk: int = 0
    cache_bits: int = 16
    depth: int = 2
    threads: int = 2
    attention: float = 1.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        least = {"batch": 1, "batches": 1, "cache_on_disk": 0, "depth": 0, "threads": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ResourceError(f"a policy with {name} {value}", f"{name} is at least {low}")
        if self.chunk is not None and self.chunk < 1:
            raise ResourceError(f"a policy with chunk {self.chunk}", "chunk is at least 1, or None for whole prompts")
        if self.cache_bits not in (16, *BITS):
            raise ResourceError(f"a cache of {self.cache_bits} bits does not exist", "choose 16, 8, 4 or 2")

    @property
    def block(self) -> int:
        """Prompts that share one load of a layer."""
        return self.batch * self.batches

    def even_chunk(self, prompt: int) -> int | None:
        """Tokens of a chunk of prompts of that length, None if they pass whole.

        As many chunks as `chunk` makes, all but the last of one size: a short rest would read all weights for little.
        """
        if self.chunk is None or self.chunk >= prompt:
            return None
        return -(-prompt // self.chunks(prompt))

    def chunks(self, prompt: int) -> int:
        """How often prompts of that length pass the blocks until the first new token."""
        return 1 if self.chunk is None else max(1, -(-prompt // self.chunk))

    def cache_is_on_disk(self, layer: int, layers: int) -> bool:
        """Whether the cache of this layer of the decoder is in files: such layers are spread evenly."""
        on_disk = min(self.cache_on_disk, layers)
        return (layer + 1) * on_disk // layers > layer * on_disk // layers

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
