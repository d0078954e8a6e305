"""Decoding with a cache of fixed size: the same tokens, and nothing in a step that a CUDA graph could not hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hfquant import HfQuantConfig
from hfquant.errors import ShapeError
from hfquant.runtime.decode import Decoder
from hfquant.runtime.nn import QLinear


class NothingReadBack(TorchDispatchMode):
    """Operators whose results Python looks at, or whose sizes depend on values, raise."""

    FORBIDDEN = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(func).startswith(self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model(built: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(built("llama"), quantization_config=HfQuantConfig("rtn-w4g64"))


def test_the_same_tokens_as_transformers(model: Any) -> None:
    assert any(isinstance(module, QLinear) for module in model.modules())
    prompts = torch.tensor([[1, 5, 9, 2], [3, 3, 7, 4]])
    expected = model.generate(prompts, max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, 4:]
    decoder = Decoder(model, batch=2, length=11)
    assert decoder.eager_because == "the model is on cpu"
    for _ in range(2):  # what was there before is forgotten
        assert torch.equal(decoder.generate(prompts, 8), expected)
    logits = decoder.prompt(prompts)
    assert torch.equal(logits.argmax(-1), expected[:, 0])


def test_a_step_decides_nothing(model: Any) -> None:
    decoder = Decoder(model, batch=1, length=8)
    decoder.prompt(torch.tensor([[1, 5, 9]]))
    memory = [t.data_ptr() for layer in decoder.cache.layers for t in (layer.keys, layer.values)]
    with NothingReadBack():
        decoder.step()
        decoder.step()
    assert memory == [t.data_ptr() for layer in decoder.cache.layers for t in (layer.keys, layer.values)]


def test_models_without_a_graph(built: Callable[[str], Path]) -> None:
    """Asked as if they were on a GPU."""
    for family, reason in (
        ("gemma2", "the cache has layers that grow in steps of their own: StaticSlidingWindowLayer"),
        ("mixtral", "experts are chosen by the CPU"),
    ):
        config = HfQuantConfig("rtn-w4g64")
        decoder = Decoder(AutoModelForCausalLM.from_pretrained(built(family), quantization_config=config), 1, 8)
        decoder.device = torch.device("cuda")
        assert decoder._eager() == reason


def test_prompts_that_do_not_fit(model: Any) -> None:
    decoder = Decoder(model, batch=1, length=8, graph=False)
    with pytest.raises(ShapeError, match=r"prompts \[2, 3\] for a decoder of 1 x 8 tokens"):
        decoder.prompt(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ShapeError, match="6 tokens and 4 new ones, for a decoder of 8"):
        decoder.generate(torch.ones(1, 6, dtype=torch.long), 4)
