"""The compressed KV cache: what it costs, and that it is one of transformers' caches in every other respect."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from hfquant.errors import RecipeError
from hfquant.runtime.kv_cache import CompressedCache, CompressedLayer
from hfquant.runtime.kv_encode import encode, pack
from hfquant.runtime.kv_packed import unpack
from tests.families import held_out


def model(family: str, trained: Callable[[str], Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(trained(family)).eval()


@torch.no_grad()
def second_half(model: PreTrainedModel, cache: DynamicCache, ids: Tensor) -> Tensor:
    """Logits of the second half of a text, the first half being in the cache."""
    half = ids.shape[1] // 2
    model(ids[:, :half], past_key_values=cache)
    return model(ids[:, half:], past_key_values=cache).logits


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.1), (2, 0.6)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_stay_within_a_bound(family: str, bits: int, bound: float, trained: Callable[[str], Path]) -> None:
    reference, ids = model(family, trained), held_out(8)
    exact = second_half(reference, DynamicCache(config=reference.config), ids)
    rounded = second_half(reference, CompressedCache(reference.config, bits, window=0, group=32), ids)
    assert 1e-5 < relative(rounded, exact) < bound


def test_more_bits_and_a_window_cost_less(trained: Callable[[str], Path]) -> None:
    reference, ids = model("llama", trained), held_out(8)
    exact = second_half(reference, DynamicCache(config=reference.config), ids)
    errors = [
        relative(second_half(reference, CompressedCache(reference.config, bits, window, 8), ids), exact)
        for bits, window in ((2, 0), (2, 16), (4, 16), (8, 16), (2, 32))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0  # nothing is older than the window


def test_a_constant_group_is_kept() -> None:
    x = torch.full((1, 1, 1, 64, 4), 3.25)
    codes, scale, low = encode(x, 4, 3)
    assert torch.equal(codes * scale.float() + low.float(), x)
    tiny = torch.linspace(0, 1e-9, 64).view(1, 1, 1, 64, 1)
    codes, scale, low = encode(tiny, 2, 3)
    assert (codes * scale.float() + low.float()).isfinite().all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("d", [16, 24, 20])
def test_packing_loses_nothing(bits: int, d: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, 5, d), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, d), codes)


def test_error_is_half_a_step() -> None:
    x = torch.randn(2, 3, 4, 32, 8, generator=torch.Generator().manual_seed(0)) * 20
    for bits in (2, 4, 8):
        codes, scale, low = encode(x, bits, 3)
        error = (codes * scale.float() + low.float() - x).abs()
        assert (error <= scale.float() * 0.501 + x.abs().amax() * 2e-3).all()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "gemma3"])
def test_generate_takes_it(family: str, trained: Callable[[str], Path], built: Callable[[str], Path]) -> None:
    reference = AutoModelForCausalLM.from_pretrained(built(family)).eval()
    ids = torch.randint(4, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    exact = reference.generate(ids, **settings)
    wide = reference.generate(ids, past_key_values=CompressedCache(reference.config, 2, window=64), **settings)
    assert torch.equal(wide, exact)
    cache = CompressedCache(reference.config, 8, window=4, group=4)
    assert reference.generate(ids, past_key_values=cache, **settings).shape == exact.shape
    assert cache.get_seq_length() == 31
    assert cache.get_mask_sizes(1, 0)[0] in (32, 31)


def test_beams_follow(built: Callable[[str], Path]) -> None:
    reference = AutoModelForCausalLM.from_pretrained(built("llama")).eval()
    ids = torch.randint(4, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "eos_token_id": None}
    exact = reference.generate(ids, **settings)
    found = reference.generate(ids, past_key_values=CompressedCache(reference.config, 8, 2, 4), **settings)
    assert (found == exact).float().mean() > 0.8


def test_encoder_decoders(built: Callable[[str], Path]) -> None:
    reference = AutoModelForSeq2SeqLM.from_pretrained(built("t5")).eval()
    ids = torch.randint(4, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1, "eos_token_id": None}
    cache = CompressedCache.for_model(reference, 8, window=2, group=4)
    found = reference.generate(ids, past_key_values=cache, **settings)
    assert (found == reference.generate(ids, **settings)).float().mean() > 0.8


def test_sequences_can_be_chosen_and_taken_back() -> None:
    layer = CompressedLayer(8, window=4, group=4)
    keys, values = torch.randn(3, 2, 19, 8), torch.randn(3, 2, 19, 8)
    layer.update(keys, values)
    layer.batch_select_indices(torch.tensor([2, 0]))
    full, _ = layer.update(keys[[2, 0], :, :1], values[[2, 0], :, :1])
    assert full.shape == (2, 2, 20, 8)
    assert relative(full[:, :, :19], keys[[2, 0]]) < 0.01
    layer.crop(-2)
    assert layer.get_seq_length() == 18
    with pytest.raises(RecipeError, match="window"):
        layer.crop(-15)
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0


def test_it_is_smaller() -> None:
    def size(bits: int) -> int:
        layer = CompressedLayer(bits, window=32, group=64)
        layer.update(torch.randn(1, 4, 1024, 64).half(), torch.randn(1, 4, 1024, 64).half())
        return layer.nbytes

    exact = 2 * 4 * 1024 * 64 * 2
    assert size(8) < 0.6 * exact
    assert size(4) < 0.36 * exact
    assert size(2) < 0.25 * exact


def test_bad_settings_are_refused(built: Callable[[str], Path]) -> None:
    config = AutoModelForCausalLM.from_pretrained(built("llama")).config
    for settings in ({"bits": 3}, {"window": -1}, {"group": 0}):
        with pytest.raises(RecipeError, match=r"hint"):
            CompressedCache(config, **settings)
