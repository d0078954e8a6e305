"""A small model of every family, built in code: random, or trained for seconds on packaged text.

Each has two to four blocks, and a tokenizer whose tokens are bytes.  A trained one has a perplexity far below
chance, so that rounding error shows up in it.  `LINEARS` was written down by looking at `print(model)`, not
computed: it is what the search for layers is compared with.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfquant.model.texts import NAMES, of_kind

HELD_OUT = 16_000  # bytes at the end of the packaged evaluation text that neither training nor calibration sees
SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
VOCABULARY = 256 + len(SPECIAL)
WINDOW = 64


@dataclass(frozen=True)
class Family:
    """A configuration class, its small settings, and where its linear layers are.

    linears: module names of every weight matrix inside the blocks, with {a,b} for alternatives.
    steps, lr: how `train` trains it.  quick: trained in every run of the tests, not only in the slow ones.
    """

    config: str
    settings: dict[str, Any]
    linears: tuple[str, ...]
    auto: str = "AutoModelForCausalLM"
    steps: int = 300
    lr: float = 8e-3
    quick: bool = False

    @property
    def encoder_decoder(self) -> bool:
        return self.auto != "AutoModelForCausalLM"


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA_LINEARS = (
    "model.layers.{0,1,2}.self_attn.{q,k,v,o}_proj",
    "model.layers.{0,1,2}.mlp.{gate,up,down}_proj",
)
MOE_LINEARS = (
    "model.layers.{0,1}.self_attn.{q,k,v,o}_proj",
    "model.layers.{0,1}.mlp.experts.{gate_up_proj,down_proj}",
)
OPT = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "dropout": 0.0,
}
OPT_LINEARS = (
    "model.decoder.layers.{0,1,2}.{self_attn.q_proj,self_attn.k_proj,self_attn.v_proj,self_attn.out_proj,fc1,fc2}",
)
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 160,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
T5_ATTENTION = (
    "{encoder,decoder}.block.{0,1}.layer.0.SelfAttention.{q,k,v,o}",
    "decoder.block.{0,1}.layer.1.EncDecAttention.{q,k,v,o}",
)
SEQ2SEQ = "AutoModelForSeq2SeqLM"

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", LLAMA | {"tie_word_embeddings": False}, LLAMA_LINEARS, steps=200, quick=True),
    "llama-tied": Family("LlamaConfig", LLAMA | {"tie_word_embeddings": True}, LLAMA_LINEARS),
    "mistral": Family("MistralConfig", LLAMA | {"sliding_window": 64}, LLAMA_LINEARS),
    "qwen2": Family("Qwen2Config", LLAMA | {"tie_word_embeddings": True}, LLAMA_LINEARS),
    "qwen3": Family("Qwen3Config", LLAMA | {"head_dim": 24}, LLAMA_LINEARS),
    "gemma2": Family(
        "Gemma2Config",
        LLAMA | {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
        LLAMA_LINEARS,
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        LLAMA | {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
        LLAMA_LINEARS,
    ),
    "phi": Family(
        "PhiConfig",
        LLAMA | {"num_key_value_heads": 4},
        (
            "model.layers.{0,1,2}.self_attn.{q_proj,k_proj,v_proj,dense}",
            "model.layers.{0,1,2}.mlp.{fc1,fc2}",
        ),
    ),
    "phi3": Family(
        "Phi3Config",
        LLAMA
        | {
            "hidden_size": 72,
            "pad_token_id": 0,
        },  # no multiple of 16: every row of groups ends in a short one
        (
            "model.layers.{0,1,2}.self_attn.{qkv_proj,o_proj}",
            "model.layers.{0,1,2}.mlp.{gate_up_proj,down_proj}",
        ),
    ),
    "gpt2": Family(
        "GPT2Config",
        {
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        ("transformer.h.{0,1,2}.{attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj}",),
        steps=250,
        lr=1e-2,
        quick=True,
    ),
    "gpt_neo": Family(
        "GPTNeoConfig",
        {
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 32,
            "max_position_embeddings": 256,
        },
        (
            "transformer.h.{0,1,2,3}.attn.attention.{k_proj,v_proj,q_proj,out_proj}",
            "transformer.h.{0,1,2,3}.mlp.{c_fc,c_proj}",
        ),
        steps=500,
        lr=5e-3,
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
        ("gpt_neox.layers.{0,1,2}.{attention.query_key_value,attention.dense,mlp.dense_h_to_4h,mlp.dense_4h_to_h}",),
    ),
    "opt": Family("OPTConfig", OPT, OPT_LINEARS, steps=250, lr=1e-2, quick=True),
    "opt-350m": Family(  # the one OPT with norms after the blocks and embeddings narrower than the stream
        "OPTConfig",
        OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
        OPT_LINEARS,
        steps=250,
        lr=4e-3,
    ),
    "bloom": Family(
        "BloomConfig",
        {"hidden_size": 64, "n_layer": 3, "n_head": 4},
        (
            "transformer.h.{0,1,2}.self_attention.{query_key_value,dense}",
            "transformer.h.{0,1,2}.mlp.{dense_h_to_4h,dense_4h_to_h}",
        ),
        steps=200,
        quick=True,
    ),
    "bart": Family(
        "BartConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 256,
            "dropout": 0.0,
            "forced_eos_token_id": None,
        },
        (
            "model.{encoder,decoder}.layers.{0,1}.self_attn.{k,v,q,out}_proj",
            "model.decoder.layers.{0,1}.encoder_attn.{k,v,q,out}_proj",
            "model.{encoder,decoder}.layers.{0,1}.{fc1,fc2}",
        ),
        SEQ2SEQ,
        steps=300,
        lr=6e-3,
        quick=True,
    ),
    "t5": Family(
        "T5Config",
        T5 | {"feed_forward_proj": "relu"},
        (
            *T5_ATTENTION,
            "encoder.block.{0,1}.layer.1.DenseReluDense.{wi,wo}",
            "decoder.block.{0,1}.layer.2.DenseReluDense.{wi,wo}",
        ),
        SEQ2SEQ,
        steps=250,
        lr=6e-3,
        quick=True,
    ),
    "flan-t5": Family(
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        (
            *T5_ATTENTION,
            "encoder.block.{0,1}.layer.1.DenseReluDense.{wi_0,wi_1,wo}",
            "decoder.block.{0,1}.layer.2.DenseReluDense.{wi_0,wi_1,wo}",
        ),
        SEQ2SEQ,
        steps=500,
        lr=6e-3,
    ),
    "mixtral": Family(
        "MixtralConfig",
        LLAMA | {"num_hidden_layers": 2, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
        MOE_LINEARS,
        steps=150,
        quick=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        LLAMA
        | {
            "num_hidden_layers": 2,
            "head_dim": 16,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        MOE_LINEARS,
    ),
    "whisper": Family(
        "WhisperConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 256,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
        },
        (
            "model.{encoder,decoder}.layers.{0,1}.self_attn.{k,v,q,out}_proj",
            "model.decoder.layers.{0,1}.encoder_attn.{k,v,q,out}_proj",
            "model.{encoder,decoder}.layers.{0,1}.{fc1,fc2}",
        ),
        "AutoModelForSpeechSeq2Seq",
        steps=600,
        lr=6e-3,
    ),
}
QUICK = [name for name, family in FAMILIES.items() if family.quick]


def linears(family: str) -> set[str]:
    """Module names of the weight matrices inside the blocks of a family."""
    names: set[str] = set()
    for pattern in FAMILIES[family].linears:
        parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
        fixed = [[",".join(part)] if i % 2 == 0 else part for i, part in enumerate(parts)]
        names.update("".join(choice) for choice in itertools.product(*fixed))
    return names


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, after four special ones: no merges, nothing to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        mask_token=mask,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def random_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """The small model of a family with random weights, in float32."""
    made = FAMILIES[family]
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if made.encoder_decoder:
        tokens["decoder_start_token_id"] = 1
    config = getattr(transformers, made.config)(**(tokens | made.settings))
    for width in ("initializer_range", "init_std"):  # 0.02 is for models many times wider
        if hasattr(config, width):
            setattr(config, width, 0.1)
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, made.auto).from_config(config)
    return model.eval()


def build_uneven(family: str, folder: Path) -> Path:
    """The same, but no norm is all ones and no bias zero, so that what happens to them shows."""
    model = random_model(family)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return _save(model, folder)


def build(family: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save the random model of a family with its tokenizer, as a checkpoint folder."""
    return _save(random_model(family, seed=seed).to(dtype), folder)


def train(
    family: str,
    folder: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Path:
    """Train the model of a family on the packaged novels and save it.  The same seed gives the same model."""
    with one_thread():
        return _save(_train(family, steps or FAMILIES[family].steps, seed, progress), folder)


@torch.enable_grad()
def _train(family: str, steps: int, seed: int, progress: Callable[[int, float], None] | None) -> PreTrainedModel:
    made = FAMILIES[family]
    model = random_model(family, seed=seed).train()
    text, order = tokens()[:-HELD_OUT], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=made.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, made.lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        starts = torch.randint(0, len(text) - WINDOW, (16,), generator=order)
        batch = torch.stack([text[a : a + WINDOW] for a in starts.tolist()])
        loss = model(**inputs(model, batch, order)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step, loss.item())
    return model.eval()


def _save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def tokens() -> Tensor:
    """The novels of the packaged texts, calibration first, as token ids: int64 [bytes].

    Models this small learn one kind of text in the time that tests have.
    """
    text = "\n\n".join(passage for name in NAMES for passage in of_kind(name, "novels"))
    return torch.tensor(byte_tokenizer()(text, verbose=False)["input_ids"])


def held_out(windows: int = 96) -> Tensor:
    """Windows of text that no training saw, int64 [windows, WINDOW]."""
    return tokens()[-HELD_OUT:][: windows * WINDOW].view(windows, WINDOW)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small lose more to a second thread than it brings, and one thread repeats exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inputs(model: PreTrainedModel, batch: Tensor, noise: torch.Generator | None = None) -> dict[str, Tensor]:
    """What the model is called with.  An encoder-decoder is to restore `batch` from a noisy copy."""
    if not model.config.is_encoder_decoder:
        return {"input_ids": batch, "labels": batch}
    if model.main_input_name == "input_features":
        frames = 2 * model.config.max_source_positions
        return {"input_features": torch.zeros(len(batch), model.config.num_mel_bins, frames), "labels": batch}
    noise = noise or torch.Generator().manual_seed(0)
    masked = torch.rand(batch.shape, generator=noise) < 0.3
    return {"input_ids": batch.masked_fill(masked, SPECIAL.index("<mask>")), "labels": batch}


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor | None = None) -> float:
    """exp of the mean cross-entropy per byte on held-out text."""
    batches = (held_out() if windows is None else windows).split(16)
    noise = torch.Generator().manual_seed(0)
    with one_thread():
        losses = [model(**inputs(model, batch, noise)).loss.float() for batch in batches]
    return math.exp(torch.stack(losses).mean().item())
