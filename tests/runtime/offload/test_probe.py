"""What is measured of a block, and how much is computed for that."""

from collections.abc import Callable
from pathlib import Path

from hfquant.runtime.offload.model import OffloadedModel
from hfquant.runtime.offload.policy import Policy
from hfquant.runtime.offload.probe import chunk


def test_a_chunk_is_measured_without_the_tokens_after_it(built: Callable[[str], Path]) -> None:
    """Its own pass twice for seconds and once for bytes, and one before that shows what a cache looks like."""
    passes: list[int] = []
    with OffloadedModel(built("llama"), Policy(depth=0)) as offloaded:
        offloaded.model.register_forward_pre_hook(
            lambda _, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        found = chunk(offloaded, 2, 4, 8)
    assert passes == [2, 4, 4, 4]
    assert (found.batch, found.chunk, found.past) == (2, 4, 8)
    assert found.block > 0
    assert found.held > 0
    assert found.work > 0
