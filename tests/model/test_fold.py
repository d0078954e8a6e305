"""Rewrites inside a block: found by looking, exact, and refused where something else reads what would change."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfquant.compress.streaming import Passage, Streamer
from hfquant.model.blocks import hidden
from hfquant.model.fold import Folder
from hfquant.model.sites import Norm, Rows, Site, measured_offset
from hfquant.model.skeleton import Skeleton
from hfquant.model.source import open_source
from hfquant.model.trace import tensors
from tests import families

Q, K, V, O = "q_proj", "k_proj", "v_proj", "o_proj"  # noqa: E741
LLAMA = {O: V, "down_proj": "up_proj", Q: "input_layernorm", "gate_proj": "post_attention_layernorm"}
GEMMA = LLAMA | {"gate_proj": "pre_feedforward_layernorm"}
# Written down by reading the models' code: the first layer of every group -> what makes its input, None if that cannot
# be rescaled.  Of encoder-decoders: the decoder's block.
MAKERS: dict[str, dict[str, str | None]] = {
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "phi": {Q: "input_layernorm", "dense": V, "fc2": None},  # fc1 is in q's group
    "phi3": {
        "qkv_proj": "input_layernorm",
        O: "qkv_proj",
        "gate_up_proj": "post_attention_layernorm",
        "down_proj": "gate_up_proj",
    },
    "gpt2": {"attn.c_attn": "ln_1", "attn.c_proj": "c_attn", "mlp.c_fc": "ln_2", "mlp.c_proj": None},
    "gpt_neo": {Q: "ln_1", "out_proj": V, "c_fc": "ln_2", "c_proj": None},
    "gpt_neox": {
        "query_key_value": "input_layernorm",
        "dense": "query_key_value",
        "dense_h_to_4h": "post_attention_layernorm",
        "dense_4h_to_h": None,
    },
    "opt": {Q: "self_attn_layer_norm", "out_proj": V, "fc1": "final_layer_norm", "fc2": "fc1"},
    "opt-350m": {Q: None, "out_proj": V, "fc1": None, "fc2": "fc1"},
    "bloom": {
        "query_key_value": "input_layernorm",
        "dense": "query_key_value",
        "dense_h_to_4h": "post_attention_layernorm",
        "dense_4h_to_h": None,
    },
    "bart": {
        f"self_attn.{Q}": None,
        "self_attn.out_proj": "self_attn.v_proj",
        f"encoder_attn.{Q}": None,
        f"encoder_attn.{K}": None,  # what the encoder gives to all decoder blocks
        "encoder_attn.out_proj": "encoder_attn.v_proj",
        "fc1": None,
        "fc2": None,
    },
    "t5": {
        "SelfAttention.q": "layer.0.layer_norm",
        "SelfAttention.o": "SelfAttention.v",
        "EncDecAttention.q": "layer.1.layer_norm",
        "EncDecAttention.k": None,
        "EncDecAttention.o": "EncDecAttention.v",
        "wi": "layer.2.layer_norm",
        "wo": "wi",
    },
    "flan-t5": {
        "SelfAttention.q": "layer.0.layer_norm",
        "SelfAttention.o": "SelfAttention.v",
        "EncDecAttention.q": "layer.1.layer_norm",
        "EncDecAttention.k": None,
        "EncDecAttention.o": "EncDecAttention.v",
        "wi_0": "layer.2.layer_norm",
        "wo": "wi_1",
    },
    "mixtral": {Q: "input_layernorm", O: V},  # experts and router are left alone
    "qwen3_moe": {Q: "input_layernorm", O: V},
    "whisper": {
        f"self_attn.{Q}": "self_attn_layer_norm",
        "self_attn.out_proj": "self_attn.v_proj",
        f"encoder_attn.{Q}": "encoder_attn_layer_norm",
        f"encoder_attn.{K}": None,
        "encoder_attn.out_proj": "encoder_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": None,
    },
}


def last_stack(folder: Path, work: Path) -> Iterator[tuple[nn.Module, Passage, int]]:
    """The blocks of the stack that the logits come from (a decoder's, where there are two), one after the other."""
    tokens = families.held_out(4)
    streamer = Streamer(Skeleton(open_source(folder), torch.float32), tokens, work, batch=4)
    passages = len(streamer.stacks)
    for at, passage in enumerate(streamer.passages(), 1):
        for i, name in enumerate(passage.stack.blocks):
            block = streamer.skeleton.load_module(name)
            if at == passages:
                yield block, passage, i
            passage.stream = passage.run(block, i, passage.stream.path.with_name(f"{passage.stack.name}.{i + 1}"))
            streamer.skeleton.drop_module(name)


def folder_of(block: nn.Module, passage: Passage, i: int, stored: torch.dtype = torch.float32) -> Folder:
    def run() -> tuple[Any, list[Tensor]]:
        args, kwargs = passage.arguments(i, 0)
        return block(*args, **kwargs), list(tensors((args, kwargs)))

    return Folder(block, run, stored)


def makers(sites: list[Site]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for site in sites:
        made = site.maker
        found[site.name] = None if made is None else made.module if isinstance(made, Norm) else made.weight.module
    return found


def factors(site: Site, block: nn.Module, seed: int = 0) -> Tensor:
    width = site.members[0].shape(block)[1]
    return torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
@pytest.mark.parametrize("family", families.FAMILIES)
def test_makers_are_found_and_every_rewrite_is_exact(
    family: str, uneven: Callable[[str], Path], tmp_path: Path
) -> None:
    """All sites of a block rescaled at once: its output is the same up to the rounding of float32."""
    for block, passage, i in last_stack(uneven(family), tmp_path):
        folder = folder_of(block, passage, i)
        sites = list(folder.sites())
        found = makers(sites)
        assert len(found) == len(MAKERS[family])
        for (layer, made), (name, expected) in zip(found.items(), sorted_like(found, MAKERS[family]), strict=True):
            assert layer.endswith(name)
            assert made is None if expected is None else made is not None and made.endswith(expected), layer
        args, kwargs = passage.arguments(i, 0)
        before = hidden(block(*args, **kwargs))
        kept = {name: p.clone() for name, p in block.named_parameters()}
        rescaled = [site for site in sites if folder.scale(site, factors(site, block)) is not None]
        assert [site.maker is not None for site in sites] == [site in rescaled for site in sites]
        changed = {name for name, p in block.named_parameters() if not torch.equal(p, kept[name])}
        assert changed == folder.changed, "no more and no less than what it says"
        after = hidden(block(*args, **kwargs))
        assert float((after - before).norm() / before.norm()) < 3e-6


def sorted_like(found: dict[str, Any], wanted: dict[str, str | None]) -> list[tuple[str, str | None]]:
    """`wanted` in the order of `found`: every layer's name ends with exactly one of its keys."""
    pairs = []
    for layer in found:
        (key,) = [key for key in wanted if layer == key or layer.endswith(f".{key}")]
        pairs.append((key, wanted[key]))
    return pairs


class Block(nn.Module):
    """norm -> two linears -> ReLU or GELU -> linear, with what a test wants hidden in it."""

    def __init__(self, leak: float = 0.0, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.act, self.leak = nn.LayerNorm(16), act(), leak
        self.one, self.two, self.three = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(32, 16)
        self.norm.weight.data.uniform_(0.5, 2)
        self.norm.bias.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z: Tensor = self.three(self.act(self.one(y))) + self.two(y) + self.leak * y.roll(1, -1)
        return x + z


def small(block: nn.Module) -> Folder:
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    return Folder(block, lambda: (block(x), [x]), torch.float32)


@torch.no_grad()
def test_a_hidden_second_reader_is_noticed() -> None:
    """Something that is no linear layer reads the norm's output too: even where it hardly matters, the fold is off."""
    (norm_site, act_site) = small(Block()).sites()
    assert isinstance(norm_site.maker, Norm)
    assert isinstance(act_site.maker, Rows)
    for leak in (1.0, 1e-2):
        block = Block(leak)
        before = {name: p.clone() for name, p in block.named_parameters()}
        folder = small(block)
        sites = list(folder.sites())
        assert sites[0].maker is None
        assert sites[0].outer
        assert folder.scale(sites[0], torch.full((16,), 2.0)) is None
        assert all(torch.equal(p, before[name]) for name, p in block.named_parameters()), "tried, and taken back"


@torch.no_grad()
def test_a_rewrite_that_turns_out_wrong_is_taken_back() -> None:
    """A site that claims what is not so is not believed."""
    block = Block(leak=0.5)
    folder = small(block)
    lie = Site(next(folder.sites()).members, Norm("norm", 0.0), True)
    before = {name: p.clone() for name, p in block.named_parameters()}
    assert folder.scale(lie, torch.linspace(0.5, 2, 16)) is None
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    assert not folder.changed


@torch.no_grad()
def test_only_positively_homogeneous_activations_let_factors_through() -> None:
    assert [site.maker is not None for site in small(Block(act=nn.ReLU)).sites()] == [True, True]
    assert [site.maker is not None for site in small(Block(act=nn.GELU)).sites()] == [True, False]
    assert [site.maker is not None for site in small(Block(act=nn.LeakyReLU)).sites()] == [True, True]


@torch.no_grad()
def test_a_norm_stays_exact_in_sixteen_bit() -> None:
    """The factors are those that the norm's rounded weight really has, so rounding it loses nothing."""
    block = Block()
    block.norm.weight.data = block.norm.weight.bfloat16().float()
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    folder = Folder(block, lambda: (block(x), [x]), torch.bfloat16)
    asked = torch.linspace(0.3, 3, 16)
    s = folder.scale(next(folder.sites()), asked)
    assert s is not None
    assert not torch.equal(s, asked)
    assert ((s / asked - 1).abs() < 2**-8).all()
    torch.testing.assert_close(block.norm.weight, block.norm.weight.bfloat16().float(), rtol=3e-7, atol=0)


def test_the_offset_of_a_norm_is_measured() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Odd(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight

    with torch.no_grad():
        assert measured_offset(Gemma2RMSNorm(16), 16) == 1.0
        assert measured_offset(LlamaRMSNorm(16), 16) == 0.0
        assert measured_offset(nn.LayerNorm(16), 16) == 0.0
        assert measured_offset(Odd(16), 16) is None
        assert measured_offset(nn.LayerNorm(8), 16) is None
