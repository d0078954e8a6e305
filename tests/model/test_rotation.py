"""Rotation of the residual stream: the rotated source computes what the original does, or is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from hfquant.compress import plan
from hfquant.errors import SourceError
from hfquant.model.rewritten import Derived
from hfquant.model.rotation import rotated, untied
from hfquant.model.source import Source, open_source
from tests import families

EXACT = [
    "llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt2", "gpt_neo", "gpt_neox", "opt", "mixtral",
    "qwen3_moe",
]  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
OTHERS = {
    "gemma": ("GemmaConfig", families.LLAMA | {"head_dim": 16}),  # norms that compute 1 + weight
    "cohere": ("CohereConfig", families.LLAMA),  # LayerNorm without a bias, attention and MLP side by side
    "gptj": ("GPTJConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 256}),
    "granite": ("GraniteConfig", families.LLAMA | {"residual_multiplier": 0.3, "embedding_multiplier": 12.0}),
    "olmoe": ("OlmoeConfig", families.LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),  # a norm of all queries
    "deepseek_v3": ("DeepseekV3Config", families.LLAMA | MLA),  # norms between layers
}
REFUSED = {
    "gemma2": r"`model\.layers\.0` computes something else.*`model\.layers\.0\.post_attention_layernorm`",
    "opt-350m": "`model.decoder.embed_tokens` is not as wide as its blocks",
    "bloom": r"another one stands outside of the blocks \(`transformer\.word_embeddings_layernorm`",
    "bart": "its decoder reads an encoder's output",
    "t5": "its decoder reads an encoder's output",
    "whisper": "its decoder reads an encoder's output",
}


@pytest.fixture(scope="session")
def other(common: Callable[..., Callable[[str], Path]]) -> Callable[[str], Path]:
    """other("gemma") -> folder of a small random model, its norms and biases uneven."""

    def make(name: str, folder: Path) -> None:
        kind, settings = OTHERS[name]
        tokens = {"vocab_size": families.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**(tokens | settings)))
        for p in model.parameters():
            p.data += 0.3 * torch.randn(p.shape) if p.ndim == 1 else 0.1 * torch.randn(p.shape)
        model.save_pretrained(folder)
        families.byte_tokenizer().save_pretrained(folder)

    return common("rotated", make)


def write(source: Source, folder: Path) -> Path:
    """A checkpoint of all that a source holds, as the end of a compression would carry it."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({name: source.read(name) for name in source.tensors}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source.path / "config.json").read_text()) | dict(source.changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(4, families.VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def check(folder: Path, out: Path) -> None:
    source = rotated(open_source(folder), seed=0)
    assert 0 < source.about["error"] < 1e-5
    before, after = logits(folder), logits(write(source, out))
    assert 0 < float((after - before).norm() / before.norm()) < 1e-5
    changed = [name for name, info in source.tensors.items() if isinstance(info, Derived)]
    assert len(changed) > len(source.tensors) / 2


@pytest.mark.parametrize("family", EXACT)
def test_stock_transformers_computes_the_same(family: str, uneven: Callable[[str], Path], tmp_path: Path) -> None:
    """Norms and biases differ everywhere, so what was not folded, or turned wrongly, would show."""
    check(uneven(family), tmp_path / "out")


@pytest.mark.parametrize("name", OTHERS)
def test_others_compute_the_same(name: str, other: Callable[[str], Path], tmp_path: Path) -> None:
    check(other(name), tmp_path / "out")


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_exact_is_refused_by_name(family: str, uneven: Callable[[str], Path]) -> None:
    with pytest.raises(SourceError, match=REFUSED[family]) as caught:
        rotated(open_source(uneven(family)), seed=0)
    assert "rotate.stream=false" in str(caught.value.hint)


@pytest.mark.parametrize("family", ["bart", "t5", "whisper"])
def test_a_plan_refuses_with_the_same_words(family: str, uneven: Callable[[str], Path], tmp_path: Path) -> None:
    """Before the shared embeddings of such a model are taken apart."""
    with pytest.raises(SourceError, match=REFUSED[family]):
        plan(uneven(family), "rotate+rtn-w4g32", tmp_path / "out")


def test_sinusoidal_positions_are_noticed(tmp_path: Path) -> None:
    """Added to the stream from no table, so that only running it shows them."""
    settings = {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128, "max_position_embeddings": 256}
    config = transformers.XGLMConfig(vocab_size=families.VOCABULARY, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="what goes into its blocks is not only embeddings"):
        rotated(open_source(tmp_path), seed=0)


def test_a_tied_head_gets_a_weight_of_its_own(uneven: Callable[[str], Path]) -> None:
    """The embeddings are rotated as they are, the head with the last norm's gain: they are not the same any more."""
    folder = uneven("llama-tied")
    original, source = open_source(folder), rotated(open_source(folder), seed=0)
    assert "lm_head.weight" not in original.tensors
    assert source.about["untied_bytes"] == source.tensors["lm_head.weight"].nbytes == 4 * families.VOCABULARY * 64
    assert source.changes == {"tie_word_embeddings": False}
    assert original.config.tie_word_embeddings
    assert not source.config.tie_word_embeddings
    assert (source.total_bytes, source.parameters) == (original.total_bytes, original.parameters)
    table, head = source.read("model.embed_tokens.weight"), source.read("lm_head.weight")
    assert float((table - head).norm() / head.norm()) > 0.1
    gain = original.read("model.norm.weight")
    norms = (original.read("model.embed_tokens.weight") * gain).norm(dim=1)
    torch.testing.assert_close(head.norm(dim=1), norms)


def test_an_untied_head_costs_nothing(uneven: Callable[[str], Path]) -> None:
    source = rotated(open_source(uneven("llama")), seed=0)
    assert source.about["untied_bytes"] == 0
    assert source.changes == {}
    assert source.tensors.keys() == open_source(uneven("llama")).tensors.keys()


def test_headers_alone_tell_its_shape(uneven: Callable[[str], Path], tmp_path: Path) -> None:
    """Before a weight is read: what the preview of a conversion knows."""
    source = open_source(uneven("gpt2"))
    nowhere = {name: replace(info, file=tmp_path / "none") for name, info in source.tensors.items()}
    outline = untied(replace(source, tensors=nowhere))
    whole = rotated(source, seed=0)
    assert {n: (t.shape, t.dtype) for n, t in outline.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in whole.tensors.items()
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pieces_are_parts_of_the_whole(family: str, uneven: Callable[[str], Path]) -> None:
    source = rotated(open_source(uneven(family)), seed=0)
    for name, info in source.tensors.items():
        if isinstance(info, Derived):
            whole = info.read()
            assert whole.dtype == torch.float32
            at, n = info.numel // 3, max(1, info.numel // 4)
            torch.testing.assert_close(info.read(at, n), whole[at : at + n], rtol=1e-5, atol=1e-6)
            assert torch.equal(info.load(torch.bfloat16), info.load(torch.float32).bfloat16()), name


def test_norms_are_all_ones(uneven: Callable[[str], Path]) -> None:
    """What they multiplied with has moved into the layers behind them; where those have no bias, a constant is left."""
    source = rotated(open_source(uneven("gpt2")), seed=0)
    ones = [n for n in source.tensors if "ln_" in n and n.endswith("weight")]
    assert len(ones) == 7
    assert all(bool((source.read(n) == 1).all()) for n in ones)
    assert bool((source.read("transformer.h.0.ln_1.bias") == 0).all())
    assert len(set(source.read("transformer.ln_f.bias").tolist())) == 1


def test_the_seed_decides(uneven: Callable[[str], Path]) -> None:
    first, again, second = (rotated(open_source(uneven("llama")), seed) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first.read(name), again.read(name))
    assert not torch.equal(first.read(name), second.read(name))


def test_weights_that_were_damaged_on_the_way_are_noticed(
    uneven: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof does not believe the rewriting: one writer that is not turned, and the block is named."""
    from hfquant.model.rotation import edits

    def forgetful(self: edits.Edits, matrix: edits.Matrix) -> dict[str, object]:
        return {} if matrix.parameter == "model.layers.1.self_attn.o_proj.weight" else kept(self, matrix)

    kept = edits.Edits._writer
    monkeypatch.setattr(edits.Edits, "_writer", forgetful)
    with pytest.raises(SourceError, match=r"`model\.layers\.1` computes something else"):
        rotated(open_source(uneven("llama")), seed=0)
