"""Tiny GGUF files of several architectures, as llama.cpp would write them, with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

F32, F16, BF16, Q8_0, Q4_1 = (gguf.GGMLQuantizationType[k] for k in ("F32", "F16", "BF16", "Q8_0", "Q4_1"))
Shapes = dict[str, tuple[int, ...]]
H, M, V, E = 64, 96, 128, 4  # hidden, intermediate, vocabulary, experts


@dataclass(frozen=True)
class Family:
    """`kv` without the architecture's prefix; `block` are the tensors of each of the two blocks."""

    arch: str
    kv: dict[str, Any]
    top: Shapes
    block: Shapes


ATTENTION: Shapes = {
    "attn_q.weight": (H, H),
    "attn_k.weight": (H // 2, H),
    "attn_v.weight": (H // 2, H),
    "attn_output.weight": (H, H),
    "attn_norm.weight": (H,),
    "ffn_norm.weight": (H,),
}
MLP: Shapes = {"ffn_gate.weight": (M, H), "ffn_up.weight": (M, H), "ffn_down.weight": (H, M)}
QK_NORM: Shapes = {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
TOP: Shapes = {"token_embd.weight": (V, H), "output_norm.weight": (H,)}
KV: dict[str, Any] = {
    "context_length": 64,
    "block_count": 2,
    "feed_forward_length": M,
    "embedding_length": H,
    "rope.freq_base": 10000.0,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "vocab_size": V,
}
# transformers does not read the width of the experts from a GGUF file: it takes 768, as Qwen3-30B-A3B has
EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (E, H),
    "ffn_gate_exps.weight": (E, 768, H),
    "ffn_up_exps.weight": (E, 768, H),
    "ffn_down_exps.weight": (E, H, 768),
}
GPT2_BLOCK: Shapes = {
    "attn_norm.weight": (H,),
    "attn_norm.bias": (H,),
    "attn_qkv.weight": (3 * H, H),
    "attn_qkv.bias": (3 * H,),
    "attn_output.weight": (H, H),
    "attn_output.bias": (H,),
    "ffn_norm.weight": (H,),
    "ffn_norm.bias": (H,),
    "ffn_up.weight": (4 * H, H),
    "ffn_up.bias": (4 * H,),
    "ffn_down.weight": (H, 4 * H),
    "ffn_down.bias": (H,),
}
CONV: Shapes = {
    "shortconv.conv.weight": (H, 3),
    "shortconv.in_proj.weight": (3 * H, H),
    "shortconv.out_proj.weight": (H, H),
    "attn_norm.weight": (H,),
    "ffn_norm.weight": (H,),
}

FAMILIES = {
    "llama": Family("llama", KV | {"rope.dimension_count": 16}, TOP, ATTENTION | MLP),
    "llama with its own head": Family(
        "llama", KV | {"rope.dimension_count": 16}, TOP | {"output.weight": (V, H)}, ATTENTION | MLP
    ),
    "gpt2": Family(
        "gpt2",
        {
            "context_length": 64,
            "block_count": 2,
            "embedding_length": H,
            "feed_forward_length": 4 * H,
            "attention.head_count": 4,
            "attention.layer_norm_epsilon": 1e-5,
        },
        # rows of the position table are looked up up to the configured 1024
        TOP | {"position_embd.weight": (1024, H), "output_norm.bias": (H,)},
        GPT2_BLOCK,
    ),
    "gemma2": Family(
        "gemma2",
        KV | {"attention.key_length": 16, "attention.sliding_window": 16},
        TOP,
        ATTENTION | MLP | {"post_attention_norm.weight": (H,), "post_ffw_norm.weight": (H,)},
    ),
    "qwen3moe": Family(
        "qwen3moe",
        KV | {"attention.key_length": 16, "expert_count": E, "expert_used_count": 2},
        TOP,
        ATTENTION | QK_NORM | EXPERTS,
    ),
    # goes through the newer of transformers' two tables
    "lfm2": Family(
        "lfm2",
        KV | {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 0]},
        {"token_embd.weight": (V, H), "token_embd_norm.weight": (H,)},
        CONV | MLP,
    ),
}


def write_gguf(
    path: Path,
    family: Family,
    kinds: tuple[gguf.GGMLQuantizationType, ...] = (Q8_0, Q4_1, F16, BF16),
    seed: int = 0,
    drop: str = "",
    extra: dict[str, Any] | None = None,
) -> Path:
    """Matrices are stored in `kinds` by turns, vectors in float32; tensors named `drop` are left out."""
    writer = gguf.GGUFWriter(path, family.arch)
    for key, value in family.kv.items():
        _add(writer, f"{family.arch}.{key}", value)
    for key, value in (extra or {}).items():
        _add(writer, key, value)
    if "tokenizer.ggml.tokens" not in (extra or {}):
        writer.add_token_list([f"t{i}" for i in range(V)])
    rng = np.random.default_rng(seed)
    shapes = family.top | {f"blk.{b}.{name}": shape for b in range(2) for name, shape in family.block.items()}
    for i, (name, shape) in enumerate(shapes.items()):
        values = rng.standard_normal(shape).astype(np.float32) / 8
        kind = kinds[i % len(kinds)] if len(shape) > 1 and "conv.conv" not in name else F32
        if name != drop:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def bpe_vocabulary() -> dict[str, Any]:
    """A byte-level BPE of 128 tokens: the bytes of ASCII text, one merge, and two special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = [bytes_to_unicode()[b] for b in range(32, 127)]
    tokens = [*characters, "he", "<s>", "</s>"]
    tokens += [f"<unused{i}>" for i in range(V - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
    }
