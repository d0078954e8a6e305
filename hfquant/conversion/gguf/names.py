"""What llama.cpp calls a model's tensors, how their rows lie there, and what it wants to know of the model.

Of each family only what differs: its architecture's name, the sizes, and whether rotary pairs lie side by side in the
rows of queries and keys, as llama.cpp's Llama has them, or half a head apart, as transformers does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from ...errors import ExportError

DENSE = "use another format, or export with `--to dense` and llama.cpp's own converter"


@dataclass(frozen=True)
class Family:
    """arch: for llama.cpp.  interleaved: q and k rows in rotary pairs.  rope: whether it has rotary positions."""

    arch: gguf.MODEL_ARCH
    interleaved: bool = False
    rope: bool = True


FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "gpt2": Family(gguf.MODEL_ARCH.GPT2, rope=False),
}


def family(config: Any) -> Family:
    """Raises ExportError for a model that this export does not know, or that llama.cpp would compute otherwise."""
    kind = str(config.model_type)
    if kind not in FAMILIES:
        raise ExportError(f"there is no export of `{kind}` models to gguf yet: {', '.join(FAMILIES)}", DENSE)
    found = FAMILIES[kind]
    rope = getattr(config, "rope_parameters", None) or {}
    if found.rope and str(rope.get("rope_type", "default")) != "default":
        raise ExportError(f"the export to gguf does not know positions of type `{rope['rope_type']}`", DENSE)
    window = getattr(config, "sliding_window", None)
    if kind == "mistral" and window and window < config.max_position_embeddings:
        raise ExportError("llama.cpp's Llama has no sliding window, which this model has", DENSE)
    return found


def facts(config: Any, chosen: Family) -> dict[str, int | float]:
    """What the architecture's part of the header says, without its prefix."""
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    said: dict[str, int | float] = {
        "block_count": int(config.num_hidden_layers),
        "context_length": int(config.max_position_embeddings),
        "embedding_length": hidden,
        "feed_forward_length": int(inner),
        "attention.head_count": heads,
    }  # fmt: skip
    if not chosen.rope:
        return said | {"attention.layer_norm_epsilon": float(config.layer_norm_epsilon)}
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or getattr(config, "rope_theta", None)
    return said | {
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "rope.freq_base": float(theta or 1e4),
        "vocab_size": int(config.vocab_size),
    }


class Names:
    """transformers' names -> llama.cpp's."""

    def __init__(self, config: Any, chosen: Family) -> None:
        self._map = gguf.get_tensor_name_map(chosen.arch, int(config.num_hidden_layers))
        self.config, self.chosen = config, chosen

    def __call__(self, name: str) -> str:
        """Raises ExportError for a tensor that has no place there."""
        found: str | None = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(f"gguf has no place for {name}", DENSE)
        return found

    def rows(self, name: str, rows: int) -> Tensor | None:
        """The order in which llama.cpp has the rows of a weight or bias; None if it is the same.  int64 [rows]"""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": getattr(self.config, "num_key_value_heads", 0)}
        leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if not self.chosen.interleaved or leaf not in heads:
            return None
        return torch.arange(rows).view(int(heads[leaf]), 2, -1).transpose(1, 2).reshape(-1)


def text(known: Mapping[str, Any], key: str) -> str | None:
    """A value of the report as a header may hold it: one line."""
    found = known.get(key)
    return " ".join(found.split())[:200] if isinstance(found, str) and found.isprintable() else None
