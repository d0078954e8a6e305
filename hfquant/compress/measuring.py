"""What it will take to read a result back and compare it with the original: `measure.verify`, foreseen."""

from dataclasses import dataclass

from ..model.inputs import longest
from .estimate import Estimate, base, forward_seconds, size_of
from .layout import Layout

WINDOW = 512  # tokens that a result is measured on together
LOADED = 4  # windows of which the original's logits are held together
MEMORY = 5e9  # bytes per second that a model decodes with


@dataclass(frozen=True)
class Measuring:
    """Bytes at most, and seconds."""

    peak_memory: int
    seconds: float


def measuring(laid: Layout, expected: Estimate, windows: int) -> Measuring:
    """Of `measure.verify`: perplexity of both models, the original block by block; then both generate a few words."""
    skeleton = laid.skeleton
    size, config = skeleton.dtype.itemsize, skeleton.source.config.get_text_config(decoder=True)
    blocks: dict[int, int] = {}
    for layer in laid.layers.values():
        blocks[layer.block] = blocks.get(layer.block, 0) + layer.bytes_before // skeleton.source.dtype.itemsize
    original, outside = size * size_of(skeleton), size * (size_of(skeleton) - sum(blocks.values()))
    # packed, and once more as kernels want it; the logits, and some rows of both models in float32
    window = min(WINDOW, longest(skeleton.source.config) or WINDOW)
    logits = int(config.vocab_size) * (window * size * (min(LOADED, windows) + 1) + 12 * 128)
    together = 2 * expected.bytes_after + outside + size * max(blocks.values()) + logits
    words = 32 * (original + 2 * expected.bytes_after) / MEMORY
    read = forward_seconds(size_of(skeleton), 2 * windows * window, skeleton.dtype)
    return Measuring(base() + max(together, original), 1.25 * read + words)
