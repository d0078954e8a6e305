"""Whole models: every replaceable module replaced, what is tied stays tied, and the way back."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from hfquant.errors import FormatError
from hfquant.runtime.nn import Packed, QEmbedding, QLinear
from hfquant.runtime.swap import dequantize_, kind, swap, tied_modules
from hfquant.tensors import formats
from hfquant.tensors.encoding import Encoding
from hfquant.tensors.formats import Wire
from hfquant.tensors.grid import Grid

from .rounding import fill

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": transformers.LlamaConfig(hidden_size=64, intermediate_size=96, tie_word_embeddings=True, **SMALL),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "gemma3": transformers.Gemma3TextConfig(hidden_size=64, intermediate_size=96, head_dim=16, **SMALL),
    "bart": transformers.BartConfig(
        vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=96, decoder_ffn_dim=96,
        encoder_attention_heads=4, decoder_attention_heads=4, scale_embedding=True, forced_eos_token_id=None,
    ),
    "t5": transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    ),
}  # fmt: skip


def model_of(family: str, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device(device):
        return auto.from_config(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 15).view(2, 6)
    extra = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra).logits


def everything(model: nn.Module, grid: Grid) -> dict[str, Grid]:
    """Every module that can be compressed and owns its weight, but for tables of positions."""
    tied = tied_modules(model)
    return {
        name: grid
        for name, module in model.named_modules()
        if kind(module) and name not in tied and "wpe" not in name and "relative" not in name
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_swap_and_back(family: str) -> None:
    """Embeddings, heads tied to them, Conv1D and scaled embeddings included; 8 bits stay close."""
    model, source = model_of(family), model_of(family)
    layers = everything(model, Grid(8, 32, False))
    tied = [n for n, owner in tied_modules(model).items() if owner in layers]
    assert swap(model, Wire(format="native", layers=layers)) == [*layers, *tied]
    assert all(isinstance(model.get_submodule(name), Packed) for name in [*layers, *tied])
    for name in layers:
        single = {name: model.get_submodule(name)}
        fill(nn.ModuleDict({"m": single[name]}), nn.ModuleDict({"m": source.get_submodule(name)}))
    model.tie_weights(recompute_mapping=False)
    before, packed = logits(source), logits(model)
    assert 0 < (packed - before).norm() < 0.05 * before.norm()
    dequantize_(model, torch.float32)
    torch.testing.assert_close(logits(model), packed)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in source.named_modules()]
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in source.named_parameters()}
    assert sorted(tied_modules(model)) == sorted(tied_modules(source))


def test_on_meta_nothing_is_allocated() -> None:
    model = model_of("llama", "meta")
    swap(model, Wire(format="native", layers=everything(model, Grid(4, 32))))
    assert all(p.is_meta for p in model.parameters())
    assert isinstance(model.lm_head, QLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_scale is model.model.embed_tokens.weight_scale
    assert model.all_tied_weights_keys["lm_head.weight_scale"] == "model.embed_tokens.weight_scale"


def test_conv1d_remembers_that_it_was_transposed() -> None:
    model = model_of("gpt2", "meta")
    name = "transformer.h.0.mlp.c_fc"
    assert isinstance(model.get_submodule(name), Conv1D)
    swap(model, Wire(format="native", layers={name: Grid(4, 32)}))
    layer = model.get_submodule(name)
    assert layer.transposed
    assert layer.shape == (256, 64)
    assert layer.bias.is_meta


def test_a_bias_that_is_there_is_kept() -> None:
    model = model_of("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    bias = model.get_submodule(name).bias
    swap(model, Wire(format="native", layers={name: Grid(4, 32)}))
    assert model.get_submodule(name).bias is bias


def test_a_pattern_takes_linear_layers_only() -> None:
    """What compressed-tensors and GPTQ configurations say: every linear layer but those ignored."""
    model = model_of("llama", "meta")
    names = swap(model, Wire(format="compressed_tensors", layers={"*": Grid(4, 32)}, ignore=("*.k_proj",)))
    assert len(names) == 2 * 6
    assert type(model.model.embed_tokens) is nn.Embedding
    assert type(model.lm_head) is nn.Linear
    assert not any("k_proj" in name for name in names)
    assert swap(model, Wire(format="compressed_tensors", layers={"*": Grid(4, 32)}, ignore=("*.k_proj",))) == []


def test_what_cannot_be_swapped_is_named() -> None:
    def refused(layers: dict[str, Grid], match: str, fmt: str = "native", family: str = "llama") -> None:
        with pytest.raises(FormatError, match=match):
            swap(model_of(family, "meta"), Wire(format=fmt, layers=layers))

    grid = Grid(4, 32)
    refused({"model.norm": grid}, r"model.norm \(LlamaRMSNorm\) cannot be compressed")
    refused({"lm_head": grid}, "lm_head shares its weight with model.embed_tokens, which is not compressed")
    refused({"model.embed_tokens": grid}, "compressed_tensors` cannot store model.embed_tokens", "compressed_tensors")
    refused({"model.layers.0.mlp.up_proj": Grid(4, 48)}, "group 48 does not divide 64", "compressed_tensors")


def test_kinds() -> None:
    assert kind(nn.Linear(2, 2)) == "linear"
    assert kind(Conv1D(2, 2)) == "conv1d"
    assert kind(nn.Embedding(2, 2)) == "embedding"
    assert kind(nn.LayerNorm(2)) is None
    assert kind(nn.MultiheadAttention(2, 1).out_proj) is None  # its weight is read, it is never called
    positions = transformers.models.bart.modeling_bart.BartLearnedPositionalEmbedding(4, 4)
    assert kind(positions) is None  # looks up something else than it is given
    layer = QEmbedding(
        4,
        32,
        encoding=Encoding(Grid(4, 32)),
        fmt=formats.load("native"),
        scale_dtype=torch.float16,
        dtype=torch.float32,
    )
    assert kind(layer) is None
